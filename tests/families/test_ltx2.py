"""LTX-2 beyond what every family must pass: sound, perturbed calls, references, coordinates, the second stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES

from psa_diffusers import apply_psa
from psa_diffusers.families import AttentionCall
from psa_diffusers.families.ltx2 import LTX2, _first_grid
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import Fallbacks, PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.run import Forward, Route, Run
from psa_diffusers.patch.sites import Layer
from psa_testing.families import CASES
from psa_testing.spies import count_selections, spy_on_attention
from psa_testing.tiny_families import EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.tiny_ltx2 import tiny_transformer
from psa_testing.tiny_pipelines import tiny_image

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
IMAGE = tiny_image(32, 32)


def given(transformer, change):
    """Change the named arguments of each forward; returns a hook."""
    return transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **change(kwargs)}), with_kwargs=True
    )


def sound(case):
    """The case with the sound's latents for a result."""
    return replace(case, call=lambda pipe, arguments: pipe(**arguments).audio)


@pytest.mark.parametrize("name", ["ltx2", "ltx2-i2v", "ltx2.3"])
def test_sound_is_that_of_stock_if_everything_is_kept(name):
    case, pipe = sound(CASES[name]), CASES[name].make()
    stock = case.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), stock)
    with apply_psa(pipe, SPARSE, strict=True):
        sparse = case.run(pipe)
    assert sparse.isfinite().all() and not torch.equal(sparse, stock), "it attends the video"


def test_all_other_attentions_are_stock_given_the_same():
    """Of text, of sound, and between sound and video; perturbed ones too."""
    case, pipe = CASES["ltx2.3"], CASES["ltx2.3"].make()
    kinds = ("audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    modules = [getattr(block, kind) for block in pipe.transformer.transformer_blocks for kind in kinds]
    calls = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((module, args, kwargs, output.clone())), with_kwargs=True
        )
        for module in modules
    ]
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe)
    for hook in hooks:
        hook.remove()
    # Guidance of three kinds; that which isolates the modalities leaves out the last two attentions.
    assert len(calls) == STEPS * (3 * len(modules) - 2 * 2)
    assert sum(bool(kwargs.get("all_perturbed")) for _, _, kwargs, _ in calls) == STEPS
    with torch.no_grad():
        assert all(torch.equal(module(*args, **kwargs), output) for module, args, kwargs, output in calls)


def test_a_perturbed_call_goes_to_the_stock_processor_in_silence():
    case, pipe = CASES["ltx2.3"], CASES["ltx2.3"].make()
    calls = {}
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        calls[index] = found = []
        block.attn1.register_forward_hook(
            lambda module, args, kwargs, output, found=found: found.append((module, args, kwargs, output.clone())),
            with_kwargs=True,
        )
    with apply_psa(pipe, SPARSE, strict=True) as psa:
        case.run(pipe)
    assert psa.stats().fallbacks == {}
    assert all(value < 0.5 for row in psa.stats().density for value in row)
    perturbed = {index: [call for call in found if call[2]["all_perturbed"]] for index, found in list(calls.items())}
    assert {index: len(found) for index, found in perturbed.items()} == {0: 0, 1: STEPS}
    with torch.no_grad():
        for module, args, kwargs, output in perturbed[1]:
            assert torch.equal(module.processor(module, *args, **kwargs), output)


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0, 1.0], [0.25, 0.0]])
def test_a_batch_of_which_some_samples_are_perturbed(values):
    """diffusers' pipelines have none; a loop of one's own may save a forward by it."""
    case, pipe = CASES["ltx2.3"], CASES["ltx2.3"].make()
    inputs = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    plain = case.run(pipe, **inputs)
    mask = {"perturbation_mask": torch.tensor(values), "spatio_temporal_guidance_blocks": [1]}
    with given(pipe.transformer, lambda kwargs: mask):
        stock = case.run(pipe, **inputs)
        assert torch.equal(stock, plain) == (values == [1.0, 1.0])
        with apply_psa(pipe, EVERYTHING, strict=True):
            assert_equal_to_rounding(case.run(pipe, **inputs), stock)
        with apply_psa(pipe, SPARSE, strict=True) as psa:
            assert not torch.equal(case.run(pipe, **inputs), stock)
        assert psa.stats().fallbacks == {} and psa.stats().density_sparse < 0.5


def test_guidance_keeps_lists_of_its_own():
    """Two samples in one forward, and one in each of two others: none takes another for a window of a long video."""
    case, pipe = CASES["ltx2.3"], CASES["ltx2.3"].make()
    with apply_psa(pipe, preset(dense_steps=0.0, refresh=STEPS), strict=True), pytest.MonkeyPatch.context() as patch:
        selections = count_selections(patch)
        case.run(pipe)
    assert len(selections) == 3 + 2, "once a run, for each layer and forward but the perturbed one"


def test_masked_references_are_dense():
    case, pipe = CASES["ltx2.3-references"], CASES["ltx2.3-references"].make()
    masked = {"conditioning_attention_strength": 0.5}
    stock = case.run(pipe, **masked)
    assert not torch.equal(case.run(pipe), stock)
    reason = "the attention between the video and its references is masked"
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match=reason) as caught:
        assert torch.equal(case.run(pipe, **masked), stock)
    assert len([each for each in caught if each.category is PSAFallbackWarning]) == 1
    assert psa.stats().density_run == 1 and len(psa.stats().fallbacks) == 1
    with apply_psa(pipe, SPARSE, strict=True), pytest.raises(PSAFallbackError, match=reason):
        case.run(pipe, **masked)


def test_a_mask_reaches_dense_attention_as_it_takes_it():
    """Where ranks or graphs were told that a layer is sparse, the patch itself computes the dense attention."""
    transformer = tiny_transformer(rope_type="split")
    attn = transformer.transformer_blocks[0].attn1
    x = torch.randn(2, 12, 32)
    mask = (1 - torch.rand(2, 12, 12).round()) * -10000.0
    call = LTX2.call({"hidden_states": x, "attention_mask": mask})
    attention = TokenAttention(LTX2, Fallbacks(strict=False))
    with torch.no_grad():
        head, _ = attention.dense(LTX2.project(attn, call), call)
        torch.testing.assert_close(LTX2.output(attn, call, head, None), attn(x, attention_mask=mask))
        assert not torch.allclose(attn(x), attn(x, attention_mask=mask))


@pytest.mark.parametrize(("name", "tokens"), [("ltx2.5-condition", 64), ("ltx2.3-references", 192), ("ltx2.3", 0)])
def test_tokens_after_the_video_are_exact(name, tokens, monkeypatch):
    case, pipe = CASES[name], CASES[name].make()
    calls = spy_on_attention(monkeypatch)
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe)
    for (q, k, v), options, (head, tail, _) in calls:
        assert (options["before"], options["after"], options["lengths"]) == (0, tokens, None)
        assert q.shape[1] == 192 + tokens and head.shape[1] == 192
        exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, 192:], k, v))).transpose(1, 2)
        torch.testing.assert_close(tail, exact)


def test_tokens_after_the_video_come_back_in_their_place():
    """And dense attention is compared with its own video tokens where presets are calibrated."""
    attention = TokenAttention(LTX2, Fallbacks(strict=False))
    chosen = preset(thresholds=[0.3, 0.5, 0.7])
    layer = Layer("a", chosen, chosen.layer_specs(1)[0], chosen.layer_orders(1)[0], False)
    forward = Forward(Run(), 0, {"a": Route(True)}, grid=(3, 8, 8))
    q, k, v = torch.randn(3, 1, 200, 2, 16).unbind()
    call = AttentionCall(q)
    (head, tail), _ = attention.sparse(layer, forward, (q, k, v), call)
    dense, _ = attention.dense((q, k, v), call)
    assert head.shape == q.shape and tail.shape == (1, 0, 2, 16)
    torch.testing.assert_close(head[:, 192:], dense[:, 192:])
    assert not torch.allclose(head[:, :192], dense[:, :192])
    assert torch.equal(attention.video_of(head, forward.grid), head[:, :192])


@pytest.mark.parametrize("name", ["ltx2", "ltx2.5-condition", "ltx2.3-references"])
def test_coordinates_alone_tell_the_grid(name):
    """As LTX2DFRPipeline gives them."""
    case, pipe = CASES[name], CASES[name].make()
    unknown = dict.fromkeys(("num_frames", "height", "width"))
    with apply_psa(pipe, SPARSE, strict=True):
        told = case.run(pipe)
        with given(pipe.transformer, lambda kwargs: unknown):
            assert torch.equal(case.run(pipe), told)


def test_the_first_grid_ends_where_other_tokens_begin():
    rope = tiny_transformer().rope
    video, again = (rope.prepare_video_coords(1, frames, 4, 6, "cpu")[0] for frames in (5, 5))
    smaller = rope.prepare_video_coords(1, 2, 2, 3, "cpu")[0]
    key = rope.prepare_video_coords(1, 1, 4, 6, "cpu")[0]
    key[0] += 32 / 24  # the last pixel frame, which is later than the beginning of the last latent one
    for others in ([], [again], [smaller], [key], [key, smaller], [smaller[:, :1]]):
        assert _first_grid(torch.cat([video, *others], dim=1)) == (5, 4, 6)
    assert _first_grid(rope.prepare_video_coords(1, 1, 4, 6, "cpu")[0]) == (1, 4, 6)
    assert _first_grid(rope.prepare_video_coords(1, 3, 1, 1, "cpu")[0]) == (3, 1, 1)


def test_a_forward_without_sizes_and_coordinates_has_no_grid():
    assert LTX2.token_grid(tiny_transformer(), {"hidden_states": torch.empty(1, 192, 8)}) is None


def test_the_step_is_known_where_every_token_is_a_condition():
    """All their timesteps are 0: the noise level alone tells the step."""
    case, pipe = CASES["ltx2.5-condition"], CASES["ltx2.5-condition"].make()
    inputs = {"conditions": [LTX2VideoCondition(frames=[IMAGE] * 9)]}
    seen = []
    hook = given(pipe.transformer, lambda kwargs: seen.append(float(kwargs["timestep"].max())) or {})
    with hook, apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, **inputs)
    assert set(seen) == {0.0}
    assert [row[0] == 1 for row in psa.stats().density] == [True, True, False, False]


def test_the_second_stage_is_a_run_of_its_own():
    """Latents twice as high and wide, few and given noise levels, a scheduler that does not shift them."""
    case, pipe = CASES["ltx2"], CASES["ltx2"].make()
    torch.manual_seed(0)
    upsampler = LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1).eval()
    upsample = LTX2LatentUpsamplePipeline(vae=pipe.vae, latent_upsampler=upsampler)
    upsample.set_progress_bar_config(disable=True)
    second = {
        "height": 64,
        "width": 64,
        "guidance_scale": 1.0,
        "audio_guidance_scale": 1.0,
        "num_inference_steps": None,
        "sigmas": STAGE_2_DISTILLED_SIGMA_VALUES,
        "noise_scale": STAGE_2_DISTILLED_SIGMA_VALUES[0],
    }
    first = pipe.scheduler

    def both_stages():
        pipe.scheduler = first
        latents = case.run(pipe)
        larger = upsample(latents=latents, height=32, width=32, num_frames=9, output_type="latent").frames
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            first.config, use_dynamic_shifting=False, shift_terminal=None
        )
        return larger, case.run(pipe, latents=larger, **second)

    larger, stock = both_stages()
    assert larger.shape == (1, 8, 3, 16, 16)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(both_stages()[1], stock)
    with apply_psa(pipe, preset(dense_steps=0.34), strict=True) as psa:
        assert not torch.equal(both_stages()[1], stock)
    stats = psa.stats()
    assert (stats.run, stats.steps, stats.dense_steps) == (2, 3, 2)
    assert [row[0] == 1 for row in stats.density] == [True, True, False]
