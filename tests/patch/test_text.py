"""Text in joint attention: exact, never pooled, dense queries; padding is attended by nobody."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_testing.expectations import pooled_attention
from psa_testing.families import CASES, ONE_EACH, TESTS_OF
from psa_testing.spies import count_selections, spy_on_attention
from psa_testing.tiny_families import SPARSE, preset

pytestmark = pytest.mark.usefixtures("one_thread")


def change_text(pipe, padding):
    """Change padding, or the first text token of each sample, on its way into the transformer; returns a hook."""

    def change(module, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        if padding:
            mask = kwargs["encoder_attention_mask"].bool()
            assert not mask.all(), "nothing is padded"
            text[~mask.view(text.shape[:-1])] += 3.0
        else:
            text[..., 0, :] += 3.0
        return args, {**kwargs, "encoder_hidden_states": text}

    return pipe.transformer.register_forward_pre_hook(change, with_kwargs=True)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_text_token_counts(name):
    case, pipe = CASES[name], CASES[name].make()
    with apply_psa(pipe, SPARSE, strict=True):
        plain = case.run(pipe)
        with change_text(pipe, padding=False):
            assert not torch.equal(case.run(pipe), plain)


@pytest.mark.parametrize("name", [name for name in ONE_EACH if TESTS_OF[name].masks_padding])
def test_padding_counts_for_nothing(name):
    """CogVideoX, Wan and SkyReels have no text mask, and attend their padding."""
    case, pipe = CASES[name], CASES[name].make()
    with apply_psa(pipe, SPARSE, strict=True):
        for inputs in ({}, *(other for other in case.others if len(other.get("prompt", "")) == 2)):
            plain = case.run(pipe, **inputs)
            with change_text(pipe, padding=True):
                assert torch.equal(case.run(pipe, **inputs), plain)


JOINT = [name for name, case in CASES.items() if case.text is not None]


@pytest.mark.parametrize("name", JOINT)
def test_text_is_exact_and_video_alone_is_pooled(name, monkeypatch):
    """Everything at level 4: blocks that mixed text and video, pooled text or padding would all show."""
    case, pipe = CASES[name], CASES[name].make()
    place, tokens, lengths = TESTS_OF[name].family.text, case.text.tokens, case.text.attended
    batch = {"prompt": ["a cat", "a dog, running"], "num_inference_steps": 2, **case.text.inputs}
    calls = spy_on_attention(monkeypatch)
    with apply_psa(pipe, preset(dense_steps=0.0, thresholds=[0.0, 0.0, 1.0], order="raster"), strict=True):
        case.run(pipe, **batch)
    assert calls
    for (q, k, v), _, (head, tail, _) in calls:
        attended = torch.cat([head, tail], dim=1)
        assert attended.shape == q.shape and q.shape[:2] == (len(lengths), tokens + 192)
        for sample, length in enumerate(lengths):
            first = 0 if place == "before" else 192
            text = torch.arange(first, first + length)
            video = torch.arange(192) + (tokens if place == "before" else 0)
            expected = pooled_attention(q[sample], k[sample], v[sample], text, video, 4)
            torch.testing.assert_close(attended[sample].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "video", "before"),
    [
        ("framepack", {}, 3 * 8 * 8, 2 * 64 + 16 + 16),
        ("ltx-condition", {}, 3 * 8 * 8, 0),
        ("ltx-condition", {"frame_index": 8, "height": 64, "num_frames": 17}, 5 * 16 * 8, 16 * 8),
    ],
)
def test_tokens_that_are_not_in_the_grid_are_exact(name, inputs, video, before, monkeypatch):
    """Framepack's earlier frames and LTX's conditions come before the video, and are attended as text is."""
    case, pipe = CASES[name], CASES[name].make()
    calls = spy_on_attention(monkeypatch)
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe, **inputs, num_inference_steps=1)
    (q, _, _), options, (head, tail, _) = calls[0]
    assert options["before"] == before
    assert head.shape[1] == before + video and tail.shape[1] == options["after"]
    assert q.shape[1] == head.shape[1] + tail.shape[1]


def test_a_mask_that_is_not_of_padding_runs_dense():
    case, pipe = CASES["mochi"], CASES["mochi"].make()

    def with_a_gap(module, args, kwargs):
        mask = kwargs["encoder_attention_mask"].clone()
        mask[:, 1] = 0
        return args, {**kwargs, "encoder_attention_mask": mask}

    pipe.transformer.register_forward_pre_hook(with_a_gap, with_kwargs=True)
    stock = case.run(pipe)
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match="padding stands between its text"):
        assert torch.equal(case.run(pipe), stock)
    assert psa.stats().density_run == 1


def test_lists_of_samples_with_different_text_serve_later_steps(monkeypatch):
    selections = count_selections(monkeypatch)
    case, pipe = CASES["hunyuan-video"], CASES["hunyuan-video"].make()
    batch = {"prompt": ["a cat", "a dog, running"], "negative_prompt": ["", "bad"]}
    with apply_psa(pipe, preset(refresh=2, share_guidance=True), strict=True):
        first = case.run(pipe, **batch)
        assert len(selections) == 4 * 2  # layers; one dense step, then two of three
        assert torch.equal(case.run(pipe, **batch), first)


@pytest.mark.parametrize("name", [name for name in JOINT if TESTS_OF[name].masks_padding])
def test_samples_with_different_text_are_what_each_is_alone(name):
    """Every sample has lists and text of its own, whatever else is in the batch."""
    case, pipe = CASES[name], CASES[name].make()
    prompts = ["a cat", "a dog, running"]
    with apply_psa(pipe, SPARSE, strict=True):
        together = case.run(pipe, prompt=prompts, negative_prompt=["", ""], generator=generators(0, 1))
        for index, prompt in enumerate(prompts):
            alone = case.run(pipe, prompt=prompt, negative_prompt="", generator=generators(index))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-4)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]
