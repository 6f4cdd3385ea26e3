"""PSAProcessor and apply_psa on whole (tiny, random) Wan pipelines."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_presets import PresetError
from psa_testing.spies import count_selections
from psa_testing.tiny_families import EVERYTHING, preset
from psa_testing.tiny_pipelines import (
    tiny_image,
    tiny_transformer,
    tiny_wan,
    tiny_wan21_i2v,
    tiny_wan_expanded,
    tiny_wan_i2v,
    tiny_wan_v2v,
)
from psa_testing.wan_latents import SIZE, run


def v2v(pipe, **overrides):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a", "video": [tiny_image(128, 128)] * 9, "strength": 0.8, "num_inference_steps": 5, **SIZE}
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, max_sequence_length=16, output_type="latent", generator=generator, **overrides).frames


def i2v(pipe, **overrides):
    return run(pipe, image=tiny_image(128, 128), **overrides)


PIPELINES = {
    "t2v": (tiny_wan, run),
    "two-experts": (lambda: tiny_wan(two_stage=True), run),
    "per-token-timesteps": (tiny_wan_expanded, run),
    "i2v": (tiny_wan_i2v, i2v),
    "i2v-image-encoder": (tiny_wan21_i2v, lambda pipe: i2v(pipe, max_sequence_length=512)),
    "i2v-two-experts": (lambda: tiny_wan_i2v(two_stage=True), i2v),
    "v2v": (tiny_wan_v2v, v2v),
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    make, call = PIPELINES[request.param]
    return make(), call


def test_a_run_with_dense_steps_only_is_bit_identical(pipeline):
    pipe, call = pipeline
    stock = call(pipe)
    with apply_psa(pipe, preset(dense_steps=1.0)) as psa:
        assert torch.equal(call(pipe), stock)
    assert psa.stats().density_run == 1 and psa.stats().density_sparse is None


def test_keeping_everything_equals_the_stock_pipeline_to_rounding(pipeline):
    pipe, call = pipeline
    stock = call(pipe)
    with apply_psa(pipe, EVERYTHING) as psa:
        sparse = call(pipe)
    torch.testing.assert_close(sparse, stock, rtol=0, atol=2e-5)
    assert psa.stats().density_sparse == 1 and psa.stats().implementation == "reference"


def test_sparse_runs_differ_repeat_and_are_undone(pipeline):
    pipe, call = pipeline
    stock = call(pipe)
    with apply_psa(pipe, preset()) as psa:
        sparse = call(pipe)
        torch.rand(5)
        assert torch.equal(call(pipe), sparse)
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)
    assert 0.2 < psa.stats().density_sparse < 0.5
    assert torch.equal(call(pipe), stock)


@pytest.mark.parametrize(
    "size",
    [
        {"height": 96, "width": 160},
        {"height": 112, "width": 80, "num_frames": 5},
        {"num_frames": 1},
        {"num_frames": 13},
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["hilbert", "tiles", "raster"])
def test_any_size_and_order_is_exact_when_everything_is_kept(size, order):
    pipe = tiny_wan()
    stock = run(pipe, **size)
    with apply_psa(pipe, EVERYTHING.replace(order=order, tile=[2, 3, 3])):
        torch.testing.assert_close(run(pipe, **size), stock, rtol=0, atol=2e-5)


def test_several_prompts_and_videos_a_prompt():
    pipe = tiny_wan()
    batch = {
        "prompt": ["a cat", "a longer prompt about a dog"],
        "negative_prompt": ["", ""],
        "num_videos_per_prompt": 2,
    }
    stock = run(pipe, **batch)
    with apply_psa(pipe, EVERYTHING):
        torch.testing.assert_close(run(pipe, **batch), stock, rtol=0, atol=2e-5)


def test_the_seed_alone_decides_whatever_ran_before():
    pipe = tiny_wan()
    with apply_psa(pipe, preset(refresh=2)):
        expected = run(pipe, seed=3)

        def abort(*_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=abort)
        run(pipe, guidance_scale=1.0, num_inference_steps=7)
        run(pipe, height=96)
        assert torch.equal(run(pipe, seed=3), expected)


def test_set_attn_processor_is_enough():
    pipe = tiny_wan()
    processor = PSAProcessor(pipe, preset=preset())
    pipe.transformer.set_attn_processor(processor)
    by_hand = run(pipe)
    assert processor.stats().density_sparse is not None
    processor.restore()
    with apply_psa(pipe, preset()):
        assert torch.equal(run(pipe), by_hand)


def test_rules_for_single_layers():
    pipe = tiny_wan()
    layers = [{"match": "0-1", "dense": True}, {"match": 3, "thresholds": [0.1, 0.1, 0.1]}]
    with apply_psa(pipe, preset(dense_steps=0.25, layers=layers)) as psa:
        run(pipe)
    assert psa.stats().density[0] == [1, 1, 1, 1]
    for row in psa.stats().density[1:]:
        assert row[:2] == [1, 1] and row[3] == pytest.approx(1 / 6) and row[3] < row[2] < 1
    with pytest.raises(PresetError, match=r"layers\[0\]\.match.*4"):
        apply_psa(pipe, preset(layers=[{"match": "4", "dense": True}]))


@pytest.mark.parametrize(
    ("changes", "selections"),
    [
        ({}, 4 * 3 * 2),
        ({"refresh": 2}, 4 * 2 * 2),
        ({"refresh": 3}, 4 * 1 * 2),
        ({"share_guidance": True}, 4 * 3),
        ({"refresh": 2, "share_guidance": True}, 4 * 2),
    ],
    ids=str,
)
def test_lists_serve_later_steps_and_the_other_branch(monkeypatch, changes, selections):
    calls = count_selections(monkeypatch)
    pipe = tiny_wan()
    with apply_psa(pipe, preset(**changes)):
        first = run(pipe)
        assert len(calls) == selections
        assert torch.equal(run(pipe), first), "lists of one run must not reach the next"
        assert len(calls) == 2 * selections


def test_patching_again_replaces_the_patch():
    pipe = tiny_wan()
    stock = run(pipe)
    outer = apply_psa(pipe, preset())
    inner = apply_psa(pipe, preset(dense_steps=1.0))
    assert torch.equal(run(pipe), stock)
    inner.restore()
    assert torch.equal(run(pipe), stock)
    outer.restore()
    assert torch.equal(run(pipe), stock)


def test_two_pipelines_with_two_presets():
    one, two = tiny_wan(), tiny_wan(num_layers=2)
    with apply_psa(one, preset()) as first, apply_psa(two, preset(dense_steps=0.5)) as second:
        expected = run(one)
        run(two)
        assert torch.equal(run(one), expected)
        assert (first.stats().dense_steps, second.stats().dense_steps) == (1, 2)
        with pytest.raises(RuntimeError, match="made for another pipeline"):
            two.transformer.set_attn_processor(first.processor)
            run(two)


def test_a_patched_pipeline_can_be_freed():
    pipe = tiny_wan()
    run(pipe)
    apply_psa(pipe, preset())
    run(pipe, num_inference_steps=2)
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert gone() is None


def test_stats_before_any_run_and_as_json():
    pipe = tiny_wan()
    with apply_psa(pipe, preset()) as psa:
        assert psa.stats().steps == 0 and psa.stats().density == []
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSAFallbackWarning)
            run(pipe)
    stats = psa.stats().to_dict()
    assert stats["steps"] == 4 and len(stats["density"]) == 4 and stats["layers"] == [f"blocks.{i}" for i in range(4)]
    mean = sum(sum(row) for row in stats["density"]) / 16
    assert stats["density_run"] == pytest.approx(mean) and stats["fallbacks"] == {}


def test_rotation_matches_the_model():
    """The family's projections equal what diffusers' processor hands to its attention function."""
    from diffusers.models.transformers import transformer_wan

    from psa_diffusers.families import AttentionCall
    from psa_diffusers.families.wan import Wan

    transformer = tiny_transformer()
    seen = {}
    original = transformer_wan.dispatch_attention_fn

    def spy(query, key, value, **options):
        seen.setdefault("qkv", (query, key, value))
        return original(query, key, value, **options)

    attn = transformer.blocks[0].attn1
    rotary = transformer.rope(torch.randn(1, 16, 3, 8, 8))
    hidden = torch.randn(1, 48, 64)
    transformer_wan.dispatch_attention_fn = spy
    try:
        with torch.no_grad():
            attn(hidden, None, None, rotary)
            ours = Wan.project(attn, AttentionCall(hidden, rotary_emb=rotary))
    finally:
        transformer_wan.dispatch_attention_fn = original
    for theirs, our in zip(seen["qkv"], ours, strict=True):
        assert torch.equal(theirs, our)
