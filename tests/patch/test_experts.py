"""Pipelines with two transformers: one dense phase, a preset for each, and none forgotten."""

from __future__ import annotations

import pytest

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_presets import PresetError, load_preset
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_wan
from psa_testing.wan_latents import run


def test_the_dense_phase_counts_the_steps_of_both_experts():
    pipe = tiny_wan(two_stage=True)
    with apply_psa(pipe, preset(dense_steps=0.5)) as psa:
        run(pipe, num_inference_steps=6)
    stats = psa.stats()
    assert (stats.steps, stats.dense_steps) == (6, 3)
    assert stats.layers[0] == "transformer.blocks.0" and stats.layers[-1] == "transformer_2.blocks.3"
    experts = [(row[:4], row[4:]) for row in stats.density]
    assert all((first[0] is None) != (second[0] is None) for first, second in experts)
    figures = [first[0] if second[0] is None else second[0] for first, second in experts]
    assert figures[:3] == [1, 1, 1] and max(figures[3:]) < 0.6


@pytest.mark.parametrize(("patched", "left_out"), [("transformer", "transformer_2"), ("transformer_2", "transformer")])
def test_an_expert_that_was_left_out_is_named(patched, left_out):
    pipe = tiny_wan(two_stage=True)
    processor = PSAProcessor(pipe, preset(dense_steps=0.0))
    getattr(pipe, patched).set_attn_processor(processor)
    call = rf"pipe\.{left_out} was not patched; call pipe\.{left_out}\.set_attn_processor\(processor\)"
    with pytest.warns(PSAFallbackWarning, match=call) as caught:
        run(pipe, num_inference_steps=6)
        run(pipe, num_inference_steps=6)
    assert len([w for w in caught if w.category is PSAFallbackWarning]) == 1
    stats = processor.stats()
    first, second = (
        {value for row in stats.density for value in row[part] if value is not None}
        for part in (slice(0, 4), slice(4, 8))
    )
    dense, sparse = (first, second) if left_out == "transformer" else (second, first)
    assert dense == {1} and max(sparse) < 0.6
    assert [count % 4 for count in stats.fallbacks.values()] == [0]
    getattr(pipe, left_out).set_attn_processor(processor)
    run(pipe, num_inference_steps=6)
    assert processor.stats().fallbacks == {}
    processor.restore()
    strict = PSAProcessor(pipe, preset(dense_steps=0.0), strict=True)
    getattr(pipe, patched).set_attn_processor(strict)
    with pytest.raises(PSAFallbackError, match=f"pipe.{left_out} was not patched"):
        run(pipe, num_inference_steps=6)


def test_an_expert_that_was_replaced_is_named():
    pipe = tiny_wan(two_stage=True)
    with apply_psa(pipe, preset(dense_steps=0.0)) as psa:
        run(pipe, num_inference_steps=6)
        patched, pipe.transformer_2 = pipe.transformer_2, tiny_wan(two_stage=True).transformer_2
        assert psa.stats().missed is None  # it was there in this run
        run(pipe, num_inference_steps=6)
        stats = psa.stats()
        assert "pipe.transformer_2 is not the transformer that was patched" in stats.missed
        assert {None} == {value for row in stats.density for value in row[4:]} and stats.density_sparse < 0.6
        pipe.transformer_2 = patched
        run(pipe, num_inference_steps=6)
        assert psa.stats().missed is None


def test_a_density_is_that_of_both_experts_presets():
    pipe = tiny_wan(two_stage=True)
    second = load_preset("psa-3").replace(block={"query": 32, "key": 16}, min_tokens=0)
    processor = PSAProcessor(pipe, preset_2=second, density=0.3)
    assert processor.presets == {
        "transformer": load_preset("psa-auto").at_density(0.3),
        "transformer_2": second.at_density(0.3),
    }
    with apply_psa(pipe, preset(dense_steps=0.0), density=0.5) as psa:
        run(pipe, num_inference_steps=6)
    assert psa.stats().density_sparse == pytest.approx(0.5, abs=0.1)
    with pytest.raises(PresetError, match="density = 0: not a share of dense attention"):
        apply_psa(pipe, density=0)
    assert not PSAProcessor(pipe).is_set()


def test_each_expert_may_have_its_own_preset():
    pipe = tiny_wan(two_stage=True)
    with apply_psa(pipe, preset(dense_steps=0.0), preset_2=preset(dense_steps=1.0)) as psa:
        run(pipe, num_inference_steps=6)
    first, second = zip(*((row[0], row[4]) for row in psa.stats().density), strict=True)
    assert max(value for value in first if value is not None) < 0.6
    assert {value for value in second if value is not None} == {1}
    with apply_psa(pipe, preset(dense_steps=0.5), preset_2=preset(dense_steps=0.2)) as psa:
        run(pipe, num_inference_steps=6)
    assert psa.stats().dense_steps == 2  # the fewer of 3 and 2
    with pytest.raises(ValueError, match="preset_2='psa-1': WanPipeline has no second transformer"):
        apply_psa(tiny_wan(), preset_2="psa-1")
