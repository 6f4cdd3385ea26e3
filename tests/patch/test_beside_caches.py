"""Beside diffusers' caches and cache-dit: each still skips what it skips, and what is left is sparse."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_testing.tiny_families import CASES, EVERYTHING, assert_equal_to_rounding, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
STEPS = 6
WAN = Case(tiny_wan, {**GUIDED, **SMALL_TEXT, "num_inference_steps": STEPS})


def every_step(pipe):
    """What timesteps a cache may serve, and how it learns the current one."""
    return {"current_timestep_callback": lambda: pipe.current_timestep}


CACHES = {
    # A threshold that serves some steps from the cache and computes others.
    "FirstBlockCacheConfig": lambda pipe: {"threshold": 0.12},
    "PyramidAttentionBroadcastConfig": lambda pipe: {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        **every_step(pipe),
    },
    "FasterCacheConfig": lambda pipe: {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": (-1, 1001),
        "attention_weight_callback": lambda _: 0.3,
        "tensor_format": "BFCHW",
        **every_step(pipe),
    },
    "MagCacheConfig": lambda pipe: {
        "num_inference_steps": STEPS,
        "retention_ratio": 0.2,
        "threshold": 0.5,
        "mag_ratios": [1.0] * STEPS,
    },
}


# FasterCache wants both guidance branches in one batch: with Wan, diffusers itself fails.
COGVIDEOX = Case(CASES["cogvideox-5b"].make, {**CASES["cogvideox-5b"].inputs, "num_inference_steps": STEPS})


def enable(pipe, name):
    config = getattr(diffusers, name, None)
    if config is None:
        pytest.skip(f"this diffusers has no {name}")
    pipe.transformer.enable_cache(config(**CACHES[name](pipe)))


def count_calls(case, pipe):
    """Run and count the calls of the self-attentions."""
    calls = []
    layers = find_family(pipe.transformer).self_attentions(pipe.transformer).values()
    hooks = [attn.to_q.register_forward_hook(lambda *_: calls.append(1)) for attn in layers]
    result = case.run(pipe)
    for hook in hooks:
        hook.remove()
    return result, len(calls)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers(name):
    case = COGVIDEOX if name == "FasterCacheConfig" else WAN
    pipe = case.make()
    _, all_calls = count_calls(case, pipe)
    enable(pipe, name)
    stock, calls = count_calls(case, pipe)
    assert 0 < calls < all_calls, "the cache is to skip some calls, not all"
    with apply_psa(pipe, EVERYTHING, strict=True) as psa:
        everything, sparse_calls = count_calls(case, pipe)
        assert sparse_calls == calls
        assert_equal_to_rounding(everything, stock)
        assert psa.stats().density_sparse == 1
    with apply_psa(pipe, preset(dense_steps=0.3), strict=True) as psa:
        sparse = case.run(pipe)
        assert torch.equal(case.run(pipe), sparse)
    assert sparse.isfinite().all() and not torch.equal(sparse, stock)
    stats = psa.stats()
    assert (stats.steps, stats.dense_steps) == (STEPS, 2) and 0.2 < stats.density_sparse < 0.5
    # A call that the cache skips has no density.
    assert all(value in (1, None) for row in stats.density[:2] for value in row)
    assert all(value is None or value < 1 for row in stats.density[2:] for value in row)


def test_a_cache_that_is_switched_on_after_the_patch_and_off_again():
    pipe = WAN.make()
    with apply_psa(pipe, preset(), strict=True):
        plain = WAN.run(pipe)
        enable(pipe, "FirstBlockCacheConfig")
        cached, calls = count_calls(WAN, pipe)
        assert calls < STEPS * 2 * 4 and not torch.equal(cached, plain)
        pipe.transformer.disable_cache()
        assert torch.equal(WAN.run(pipe), plain)


@pytest.fixture
def unknown_h3(monkeypatch):
    """MiniMax-H3's blocks are registered within one test alone."""
    helpers = pytest.importorskip("diffusers.hooks._helpers")
    helpers.TransformerBlockRegistry._register()
    monkeypatch.setattr(helpers.TransformerBlockRegistry, "_registry", {**helpers.TransformerBlockRegistry._registry})


@pytest.mark.skipif("minimax-h3" not in CASES, reason="this diffusers has no MiniMax-H3")
def test_the_first_block_cache_on_minimax_h3(unknown_h3):
    """As docs/recipes.md has it."""
    case = CASES["minimax-h3"]
    snippet = next(part for part in RECIPES.read_text(encoding="utf-8").split("```") if "BlockRegistry" in part)
    assert snippet.count("threshold=0.05") == 1

    def with_threshold(threshold):
        def call(pipe, inputs):
            names = {}
            exec(snippet.removeprefix("python").replace("threshold=0.05", f"threshold={threshold}"), names)
            return names["run_cached"](pipe, **inputs).get("latents")

        return Case(case.build, case.inputs, call=call)

    pipe, results = case.make(), {}
    for name, chosen in (("stock", None), ("everything", EVERYTHING), ("sparse", preset(dense_steps=0.3))):
        psa = chosen and apply_psa(pipe, chosen, strict=True)
        plain, all_calls = count_calls(case, pipe)
        nothing_skipped, calls = count_calls(with_threshold(-1), pipe)
        assert torch.equal(nothing_skipped, plain) and calls == all_calls == 2 * 4
        results[name], calls = count_calls(with_threshold(0.3), pipe)
        assert calls == 2 * 4 - 2 and not torch.equal(results[name], plain)
        assert results[name].isfinite().all() and torch.equal(case.run(pipe), plain)
        if psa:
            psa.restore()
    assert_equal_to_rounding(results["everything"], results["stock"])
    assert not torch.equal(results["sparse"], results["stock"])


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
def test_cache_dit(name):
    cache_dit = pytest.importorskip("cache_dit")
    case = WAN if name == "wan" else Case(CASES[name].make, {**CASES[name].inputs, "num_inference_steps": STEPS})
    pipe = case.make()
    settings = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=0.3
    )
    cache_dit.enable_cache(pipe, cache_config=settings)
    stock = case.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True) as psa:
        assert_equal_to_rounding(case.run(pipe), stock)
        stats = psa.stats()
    assert any(value is None for row in stats.density for value in row), "the cache is to skip some calls"
    with apply_psa(pipe, preset(), strict=True) as psa:
        assert case.run(pipe).isfinite().all()
    assert 0.2 < psa.stats().density_sparse < 0.5
    assert psa.processor._runs._run.watch
    cache_dit.disable_cache(pipe)
