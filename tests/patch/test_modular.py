"""Modular pipelines: patched, run and restored as the others are; which run goes on is told by `components`."""

from __future__ import annotations

import pytest
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.families import UnsupportedModelError
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_diffusers.patch.modules import attention_modules, find_transformers
from psa_testing.modular_pipelines import MODULAR
from psa_testing.spies import count_selections
from psa_testing.tiny_families import EVERYTHING, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODULAR)
def case(request):
    return MODULAR[request.param]


def test_dense_steps_are_bit_identical_and_everything_kept_equals_stock(case):
    pipe = case.make()
    stock = case.run(pipe)
    with apply_psa(pipe, preset(dense_steps=1.0)) as psa:
        assert torch.equal(case.run(pipe), stock)
    assert psa.stats().density_run == 1 and psa.stats().fallbacks == {}
    with apply_psa(pipe, EVERYTHING, strict=True) as psa:
        assert_equal_to_rounding(case.run(pipe), stock)
    assert psa.stats().density_sparse == 1


def test_a_sparse_run_counts_its_steps_and_is_undone(case):
    pipe = case.make()
    own = [attn.processor for module in find_transformers(pipe).values() for attn in attention_modules(module)]
    stock = case.run(pipe)
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        sparse = case.run(pipe)
        assert torch.equal(case.run(pipe), sparse)
    assert sparse.isfinite().all() and float((sparse - stock).abs().max()) > 1e-3
    stats = psa.stats()
    assert (stats.run, stats.steps, stats.dense_steps, stats.fallbacks) == (2, 4, 2, {})
    ran = [[value for value in row if value is not None] for row in stats.density]
    assert [len(row) for row in ran] == [2] * 4 and ran[:2] == [[1, 1], [1, 1]]
    assert all(0.2 < value < 0.5 for row in ran[2:] for value in row)
    assert own == [attn.processor for module in find_transformers(pipe).values() for attn in attention_modules(module)]
    assert torch.equal(case.run(pipe), stock)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video-1.5", "ltx"])
def test_set_attn_processor_is_enough(name):
    case, pipe = MODULAR[name], MODULAR[name].make()
    processor = PSAProcessor(pipe, preset(), strict=True)
    pipe.transformer.set_attn_processor(processor)
    by_hand = case.run(pipe)
    assert processor.stats().density_sparse < 0.5
    processor.restore()
    with apply_psa(pipe, preset()):
        assert torch.equal(case.run(pipe), by_hand)


def test_an_expert_that_was_left_out_is_told_of():
    case, pipe = MODULAR["wan-2.2"], MODULAR["wan-2.2"].make()
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset()))
    with pytest.warns(PSAFallbackWarning, match=r"pipe\.transformer_2 was not patched"):
        case.run(pipe)


def test_another_pipeline_of_the_same_components_tells_its_own_steps():
    """The patched one has never run, and its scheduler is another."""
    case, patched, other = MODULAR["wan"], MODULAR["wan"].make(), MODULAR["wan"].make()
    other.update_components(transformer=patched.transformer)
    with apply_psa(patched, preset(dense_steps=0.25), strict=True) as psa:
        case.run(other, num_inference_steps=8)
        assert (psa.stats().steps, psa.stats().dense_steps) == (8, 2)
        case.run(patched)
        assert (psa.stats().steps, psa.stats().dense_steps) == (4, 1)


def test_a_pipeline_without_its_components_says_what_to_do():
    with pytest.raises(
        UnsupportedModelError, match=r"WanModularPipeline has no transformer yet: call .*load_components"
    ):
        apply_psa(WanBlocks().init_pipeline())


def test_a_transformer_that_is_replaced_is_told_of():
    case, pipe = MODULAR["wan"], MODULAR["wan"].make()
    with apply_psa(pipe, preset(), strict=True) as psa:
        case.run(pipe)
        assert psa.stats().missed is None
        pipe.update_components(transformer=MODULAR["wan"].make().transformer)
        case.run(pipe)
        assert "with another transformer, which is not patched" in psa.stats().missed and psa.stats().steps == 4


def test_an_aborted_run_is_followed_by_a_new_one():
    case, pipe = MODULAR["wan"], MODULAR["wan"].make()

    def abort(module, args, output):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)

    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        expected, calls = case.run(pipe), []
        hook = pipe.transformer.register_forward_hook(abort)
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe)
        hook.remove()
        assert torch.equal(case.run(pipe), expected)
        assert (psa.stats().run, psa.stats().steps) == (3, 4)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video-1.5", "ltx"])
def test_guidance_is_two_branches_of_a_step(name, monkeypatch):
    selections = count_selections(monkeypatch)
    case, pipe = MODULAR[name], MODULAR[name].make()
    with apply_psa(pipe, preset(dense_steps=0.5, share_guidance=True), strict=True):
        case.run(pipe)
        assert len(selections) == 2 * 2  # steps, layers
    selections.clear()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True):
        case.run(pipe)
        assert len(selections) == 2 * 2 * 2
