"""MiniMax-H3: which rows of its packed sequence are sparse, its sound, its two transformers, and its steps."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from diffusers.modular_pipelines.minimax_h3 import references
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.families import minimax_h3
from psa_diffusers.families.minimax_h3 import MiniMaxH3
from psa_diffusers.families.parts import ReadOnce
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.modules import find_transformers
from psa_testing.cases import Case
from psa_testing.expectations import pooled_attention
from psa_testing.families import CASES
from psa_testing.families.minimax_h3 import (
    TESTS,
    TEXT,
    conditions,
    embeddings,
    keyframes,
    latents_of,
    layout,
    tiny_h3_whole,
)
from psa_testing.spies import spy_on_attention
from psa_testing.tiny_families import EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.tiny_pipelines import tiny_image

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = 2 * 207
# Rows before the video: of text, of conditions, and of sound.
BEFORE = {
    "minimax-h3": TEXT + SOUND,
    "minimax-h3-fl2va": TEXT + 2 * 2 * 3 + SOUND,
    "minimax-h3-ref2va": TEXT + 2 * 2 + 20 + 30 + 7 * 2 * 3 + SOUND,
}


def grid_of(rows):
    return MiniMaxH3.token_grid(None, rows)


@pytest.mark.parametrize("name", TESTS.cases)
def test_the_sound_is_that_of_stock_where_everything_is_kept(name):
    case, pipe = CASES[name], CASES[name].make()
    sound = Case(case.build, case.inputs, call=partial(latents_of, name="audio_latents"))
    stock = sound.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(sound.run(pipe), stock)
    with apply_psa(pipe, preset(), strict=True):
        sparse = sound.run(pipe)
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)


@pytest.mark.parametrize(("name", "before"), BEFORE.items())
def test_all_rows_but_the_videos_are_exact(name, before, monkeypatch):
    """Their queries are dense, those of the sound above all; and of the keys only the video's are pooled."""
    case, pipe = CASES[name], CASES[name].make()
    calls = spy_on_attention(monkeypatch)
    size = {
        "height": 128,
        "width": 128,
        **(keyframes("first", "last", height=128, width=128) if "fl2va" in name else {}),
    }
    with apply_psa(pipe, preset(dense_steps=0.0, thresholds=[0.0, 0.0, 1.0], order="raster"), strict=True):
        case.run(pipe, num_inference_steps=2, **size)
    assert len(calls) == 2
    more = 2 * (16 - 6) if "fl2va" in name else 0
    for (q, k, v), options, (head, tail, _) in calls:
        assert (options["before"], options["after"], tail.shape[1]) == (before + more, 0, 0)
        rows = torch.arange(head.shape[1])
        expected = pooled_attention(q[0], k[0], v[0], *rows.split([before + more, 37 * 16]), 4)
        torch.testing.assert_close(head[0].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TESTS.cases)
def test_the_sounds_attention_is_that_of_stock_in_the_first_sparse_layer(name):
    case, pipe = CASES[name], CASES[name].make()
    seen = []
    first = next(iter(MiniMaxH3.self_attentions(next(iter(find_transformers(pipe).values()))).values()))
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    case.run(pipe)
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe)
    stock, sparse = seen[0], seen[4]
    sound = slice(BEFORE[name] - SOUND, BEFORE[name])
    torch.testing.assert_close(sparse[:, sound], stock[:, sound], rtol=0, atol=1e-6)
    assert float((sparse - stock)[:, BEFORE[name] :].abs().max()) > 1e-3


def test_the_text_refiner_is_no_layer():
    pipe = CASES["minimax-h3"].make()
    with apply_psa(pipe, SPARSE) as psa:
        assert psa.stats().layers == ["transformer_blocks.0", "transformer_blocks.1"]


@pytest.mark.parametrize(("frames", "tokens"), [(37, 37_296), (72, 72_576), (107, 107_856)])
def test_the_grids_of_5_10_and_15_seconds(frames, tokens):
    """768 x 1344: latents of 48 x 84. diffusers' pipeline stops at 345 frames, 102 of latents; the model does not."""
    rows = layout(frames, 48, 84, text=300, audio=200, anchors=("first", "last"))
    assert grid_of(rows) == (frames, 24, 42) and frames * 24 * 42 == tokens
    assert MiniMaxH3.tokens(rows, (frames, 24, 42)) == 300 + 2 * 24 * 42 + 2 * 200 + tokens


@pytest.mark.parametrize("kinds", [("image",), ("video",), ("voice", "video"), ("video", "voice"), ("image", "video")])
def test_references_are_not_in_the_grid(kinds):
    given = conditions(*kinds)
    build = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence
    tags = embeddings(TEXT, (2, 5))["text_token_tags"]
    latents = [given[name] for name in ("normalized_references", "condition_latents", "audio_condition_latents")]
    positions, tags, *_ = build(tags, *latents, 12, 4, 6, 5, (1, 2, 2), 2, 2, 0)
    assert grid_of({"position_ids": positions, "token_tags": tags}) == (12, 2, 3)


@pytest.mark.parametrize("anchor", ["first", "last"])
def test_a_keyframe_beside_the_video_is_not_in_the_grid(anchor):
    """No pipeline leaves out the sound between them; then their times tell them apart."""
    rows = layout(12, 4, 6, TEXT, audio=0, anchors=(anchor,))
    assert grid_of(rows) == (12, 2, 3) and len(rows["audio_indices"]) == 0


def inputs_of_a_run(case, pipe):
    """What the transformer is given at each step."""
    given = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: given.append(kwargs), with_kwargs=True)
    case.run(pipe)
    hook.remove()
    return given


@torch.no_grad()
def test_a_sequence_that_does_not_end_with_a_video_is_dense():
    pipe = CASES["minimax-h3"].make()
    given = inputs_of_a_run(CASES["minimax-h3"], pipe)[1]
    places = torch.cat([given[name] for name in ("video_indices", "text_indices", "audio_indices")])
    moved = {name: given[name][places] for name in ("position_ids", "token_tags", "timestep_indices")}
    moved |= {name: places.argsort()[given[name]] for name in given if name.endswith("_indices") and name not in moved}
    moved = {**given, **moved}
    stock = pipe.transformer(**moved)
    with apply_psa(pipe, SPARSE) as psa, psa.run([0.0, float(MiniMaxH3.timestep(moved))]):
        with pytest.warns(PSAFallbackWarning, match="does not tell the transformer the video's frames"):
            assert torch.equal(pipe.transformer(**moved)[0], stock[0])
        assert psa.stats().density_run == 1
    torch.testing.assert_close(stock[0], pipe.transformer(**given)[0])
    assert grid_of({}) is None


def test_the_step_is_that_of_the_video_whatever_the_sound_and_conditions_are_at():
    case, pipe = CASES["minimax-h3-ref2va"], CASES["minimax-h3-ref2va"].make()
    seen = []

    def note(module, args, kwargs):
        seen.append((MiniMaxH3.timestep(kwargs).item(), kwargs["timestep"].tolist()))

    pipe.transformer_ref.register_forward_pre_hook(note, with_kwargs=True)
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, num_inference_steps=9)
    stats = psa.stats()
    assert (stats.run, stats.steps, stats.dense_steps) == (1, 8, 4)
    assert [row[0] == 1 for row in stats.density] == [True] * 4 + [False] * 4
    assert [given for given, _ in seen] == pipe.scheduler.timesteps.tolist()
    # The video's own, the sound's, that of conditions, and that of their sound; at first the former two are alike.
    assert [len(values) for _, values in seen] == [3] + [4] * 7
    assert MiniMaxH3.timestep({}) is None


@torch.no_grad()
def test_a_run_of_few_steps_by_hand():
    """Without diffusers' pipeline."""
    pipe = CASES["minimax-h3"].make()
    given = inputs_of_a_run(CASES["minimax-h3"], pipe)
    timesteps = torch.stack([MiniMaxH3.timestep(kwargs)[0] for kwargs in given])
    processor = PSAProcessor(pipe, preset(dense_steps=0.25), strict=True)
    pipe.transformer.set_attn_processor(processor)
    with processor.run(timesteps):
        for kwargs in given:
            pipe.transformer(**kwargs)
    assert (processor.stats().steps, processor.stats().dense_steps) == (4, 1)
    assert [row[0] == 1 for row in processor.stats().density] == [True, False, False, False]


WHOLE = Case(tiny_h3_whole, {**CASES["minimax-h3"].inputs, "output_type": "pt"}, call=latents_of)
WORKFLOWS = {
    "t2va": {},
    "fl2va": {"image": tiny_image(96, 64), "last_image": tiny_image(80, 80)},
    "ref2va": {
        "references": [
            references.MiniMaxH3ImageReference(image=tiny_image(80, 64)),
            references.MiniMaxH3AudioReference(audio=torch.ones(2, 4000), sample_rate=8000),
        ]
    },
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_whole_pipeline_runs_each_workflow_with_its_transformer(name):
    inputs, pipe = WORKFLOWS[name], WHOLE.make()
    sound = Case(WHOLE.build, WHOLE.inputs, call=partial(latents_of, name="audio"))
    stock, stock_sound = WHOLE.run(pipe, **inputs), sound.run(pipe, **inputs)
    with apply_psa(pipe, preset(dense_steps=1.0)):
        assert torch.equal(WHOLE.run(pipe, **inputs), stock)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(WHOLE.run(pipe, **inputs), stock)
        assert_equal_to_rounding(sound.run(pipe, **inputs), stock_sound)
    with apply_psa(pipe, preset(), strict=True) as psa:
        sparse = WHOLE.run(pipe, **inputs)
    stats, which = psa.stats(), "transformer_ref" if name == "ref2va" else "transformer"
    assert sparse.isfinite().all() and float((sparse - stock).abs().max()) > 1e-3
    ran = [layer for layer, value in zip(stats.layers, stats.density[-1], strict=True) if value is not None]
    assert ran == [f"{which}.transformer_blocks.0", f"{which}.transformer_blocks.1"] and len(stats.layers) == 4
    assert (stats.steps, stats.dense_steps) == (4, 1) and 0.2 < stats.density_sparse < 0.5
    assert torch.equal(WHOLE.run(pipe, **inputs), stock)


def test_the_transformer_of_another_workflow_may_be_left_out():
    """No word of it while it does not run; a run of it is dense, and says why."""
    pipe = WHOLE.make()
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, SPARSE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSAFallbackWarning)
        WHOLE.run(pipe)
    with pytest.warns(PSAFallbackWarning, match=r"pipe\.transformer_ref was not patched"):
        WHOLE.run(pipe, **WORKFLOWS["ref2va"])
    pipe = WHOLE.make()
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, SPARSE, strict=True))
    WHOLE.run(pipe)
    with pytest.raises(PSAFallbackError, match=r"pipe\.transformer_ref was not patched"):
        WHOLE.run(pipe, **WORKFLOWS["ref2va"])


def test_the_grid_is_read_once_a_run(monkeypatch):
    """To read it waits for the device."""
    reads = []
    read = ReadOnce(lambda *tensors: reads.append(1) or minimax_h3._read(*tensors))
    monkeypatch.setattr(minimax_h3, "_grid", read)
    case, pipe = CASES["minimax-h3"], CASES["minimax-h3"].make()
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe)
        assert len(reads) == 1
        case.run(pipe, height=96, width=96)
    assert len(reads) == 2


def test_a_grid_that_was_kept_is_never_stale():
    rows = layout(3, 4, 6, TEXT)
    assert grid_of(rows) == (3, 2, 3)
    rows["position_ids"].copy_(layout(2, 6, 6, TEXT)["position_ids"])
    assert grid_of(rows) == (2, 3, 3)
    rows["token_tags"][-9:] = 2
    assert grid_of(rows) is None
    assert grid_of(layout(3, 4, 6, TEXT)) == (3, 2, 3)
    with torch.inference_mode():
        rows = layout(3, 4, 6, TEXT)
        assert grid_of(rows) == (3, 2, 3)
        rows["position_ids"].copy_(layout(2, 6, 6, TEXT)["position_ids"])
        assert grid_of(rows) == (2, 3, 3)


def test_tensors_that_are_read_are_not_kept_alive():
    calls = []
    read = ReadOnce(lambda x: calls.append(int(x)) or int(x))
    assert [read(torch.tensor(value)) for value in (1, 2, 1)] == [1, 2, 1]
    kept = torch.tensor(3)
    assert [read(kept), read(kept)] == [3, 3] and calls == [1, 2, 1, 3]


def test_blocks_fused_before_the_patch():
    case, pipe = CASES["minimax-h3"], CASES["minimax-h3"].make()
    pipe.transformer.fuse_qkv_projections()
    for block in pipe.transformer.transformer_blocks:
        # As the other three would be left over.
        block.attn.to_q.weight.data.zero_()
    stock = case.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), stock)


def test_inference_mode():
    case, pipe = CASES["minimax-h3"], CASES["minimax-h3"].make()
    with torch.no_grad(), apply_psa(pipe, preset(), strict=True):
        expected = case.run(pipe)
    with torch.inference_mode(), apply_psa(pipe, preset(), strict=True):
        assert torch.equal(case.run(pipe), expected)
