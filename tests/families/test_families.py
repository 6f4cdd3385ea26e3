"""Every model family on whole (tiny, random) pipelines: parity with stock diffusers, and peculiarities."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.families import find_family
from psa_diffusers.families.ltx import LTXVideo
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.families import CASES, HERE, ONE_EACH, PARALLEL, SAVED, TESTS, TESTS_OF
from psa_testing.random_norms import NORMS
from psa_testing.tiny_families import EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.tiny_pipelines import tiny_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_a_run_with_dense_steps_only_is_bit_identical(case):
    pipe = case.make()
    with apply_psa(pipe, preset(dense_steps=1.0)) as psa:
        assert torch.equal(case.run(pipe), case.stock)
    assert psa.stats().density_run == 1 and psa.stats().density_sparse is None


def test_keeping_everything_equals_the_stock_pipeline_to_rounding(case):
    """At other sizes and batches for two steps: what a step leaves to the next would show in the second."""
    pipe = case.make()
    for inputs in ({}, *({"num_inference_steps": 2, **other} for other in case.others)):
        stock = case.run(pipe, **inputs) if inputs else case.stock
        with apply_psa(pipe, EVERYTHING, strict=True) as psa:
            assert_equal_to_rounding(case.run(pipe, **inputs), stock, inputs)
        assert psa.stats().density_sparse == 1 and psa.stats().implementation == "reference"


@pytest.mark.parametrize("name", ["anyflow", "cosmos", "framepack", "hunyuan-video", "kandinsky5", "wan"])
def test_autocast_costs_what_it_costs_the_stock_pipeline(name):
    """Where norms and rotations stay in float32, queries, keys and values come in several dtypes."""
    case, pipe = CASES[name], CASES[name].make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = case.run(pipe)
        with apply_psa(pipe, EVERYTHING, strict=True):
            kept = case.run(pipe)
    error, of_stock = ((x.double() - case.stock).norm() for x in (kept, stock))
    assert 0 < error < 1.5 * of_stock


def test_sparse_runs_differ_repeat_and_are_undone(case):
    pipe, stock = case.make(), case.stock
    with apply_psa(pipe, preset(), strict=True) as psa:
        sparse = case.run(pipe)
        torch.rand(5)
        assert torch.equal(case.run(pipe), sparse)
    assert sparse.isfinite().all() and float((sparse - stock).abs().max()) > 1e-3
    stats = psa.stats()
    assert 0.2 < stats.density_sparse < 0.5 and stats.fallbacks == {}
    assert stats.density[0] == [1.0] * len(stats.layers) and all(value < 1 for value in stats.density[-1])
    assert torch.equal(case.run(pipe), stock)


def test_guidance_branches_are_not_taken_for_windows(case):
    """Then nothing would be kept for later steps."""
    pipe = case.make()
    with apply_psa(pipe, preset(correction=True, refresh=2, share_guidance=True), strict=True):
        case.run(pipe)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (
            "hunyuan-video",
            [f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in (0, 1)],
        ),
        ("cogvideox-2b", [f"transformer_blocks.{i}" for i in range(3)]),
        ("wan-vace", [*(f"blocks.{i}" for i in range(3)), "vace_blocks.0", "vace_blocks.1"]),
        ("wan-animate", ["blocks.0", "blocks.1"]),
        ("hunyuan-video-1.5", ["transformer_blocks.0", "transformer_blocks.1"]),
        ("ltx2.3", ["transformer_blocks.0", "transformer_blocks.1"]),
    ],
)
def test_the_layers_are_the_video_self_attentions(name, layers):
    """Neither cross-attention, nor HunyuanVideo's token refiner, Animate's face adapter, or LTX-2's sound."""
    with apply_psa(CASES[name].make(), SPARSE) as psa:
        assert psa.stats().layers == layers


BY_SET_ATTN_PROCESSOR = [name for name in ONE_EACH if TESTS_OF[name].has_set_attn_processor]


@pytest.mark.parametrize("name", [*BY_SET_ATTN_PROCESSOR, "hunyuan-video-i2v", "cogvideox-1.5"])
def test_set_attn_processor_is_enough(name):
    case, pipe = CASES[name], CASES[name].make()
    processor = PSAProcessor(pipe, preset=preset())
    pipe.transformer.set_attn_processor(processor)
    by_hand = case.run(pipe)
    assert processor.stats().density_sparse < 0.5
    processor.restore()
    with apply_psa(pipe, preset()):
        assert torch.equal(case.run(pipe), by_hand)


@pytest.mark.parametrize("name", [name for name in ONE_EACH if name not in BY_SET_ATTN_PROCESSOR])
def test_models_without_set_attn_processor_are_patched_and_restored(name):
    pipe = CASES[name].make()
    assert not hasattr(pipe.transformer, "set_attn_processor")
    modules = [module for module in pipe.transformer.modules() if hasattr(module, "processor")]
    before = [module.processor for module in modules]
    with apply_psa(pipe, SPARSE) as psa:
        assert all(module.processor is psa.processor for module in modules)
    assert [module.processor for module in modules] == before


def test_diffusion_forcing_counts_its_steps():
    """It steps copies of its scheduler, one a frame; the pipeline's own stays where it was."""
    case, pipe = CASES["skyreels-v2-forcing"], CASES["skyreels-v2-forcing"].make()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe)
    stats = psa.stats()
    assert (stats.steps, stats.dense_steps) == (4, 2)
    assert [row[0] == 1 for row in stats.density] == [True, True, False, False]


def test_diffusion_forcing_in_causal_blocks_is_dense():
    case, pipe = CASES["skyreels-v2-forcing"], CASES["skyreels-v2-forcing"].make()
    pipe.transformer._set_ar_attention(2)
    inputs = {"num_frames": 13, "causal_block_size": 2, "ar_step": 1}
    stock = case.run(pipe, **inputs)
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match="diffusion forcing in causal blocks"):
        assert torch.equal(case.run(pipe, **inputs), stock)
    assert psa.stats().density_run == 1
    with apply_psa(pipe, SPARSE, strict=True), pytest.raises(PSAFallbackError, match="masks the attention"):
        case.run(pipe, **inputs)


def give_a_mask(attn, name):
    """Let an attention module be called with a mask that hides nothing, by the name it has for one; returns a hook."""
    signature = inspect.signature(attn.forward)

    def mask(module, args, kwargs):
        call = signature.bind(*args, **kwargs)
        hidden = call.arguments["hidden_states"]
        named = call.arguments if name in signature.parameters else call.arguments["kwargs"]
        named[name] = torch.ones(len(hidden), 1, hidden.shape[1], dtype=torch.bool)
        return call.args, call.kwargs

    return attn.register_forward_pre_hook(mask, with_kwargs=True)


@pytest.mark.parametrize(
    "name", [name for name in ONE_EACH if TESTS_OF[name].family.text == "none" and TESTS_OF[name].mask is not None]
)
def test_a_mask_of_video_tokens_is_dense(name):
    case, pipe, mask = CASES[name], CASES[name].make(), TESTS_OF[name].mask
    family = find_family(pipe.transformer)
    [layer, attn], *_ = family.self_attentions(pipe.transformer).items()
    with apply_psa(pipe, SPARSE) as psa, give_a_mask(attn, mask):
        with pytest.warns(PSAFallbackWarning, match="given an attention mask|masks the attention between frames"):
            case.run(pipe)
        stats = psa.stats()
        index = stats.layers.index(layer)
        assert all(row[index] == 1 and min(row) < 0.5 for row in stats.density)
    with apply_psa(pipe, SPARSE, strict=True), give_a_mask(attn, mask), pytest.raises(PSAFallbackError, match="mask"):
        case.run(pipe)


def test_a_video_of_unknown_size_is_dense(monkeypatch):
    case, pipe = CASES["ltx"], CASES["ltx"].make()
    stock = case.run(pipe)
    monkeypatch.setattr(LTXVideo, "token_grid", staticmethod(lambda transformer, inputs: None))
    with apply_psa(pipe, SPARSE) as psa, pytest.warns(PSAFallbackWarning, match="does not tell the transformer"):
        assert torch.equal(case.run(pipe), stock)
    assert psa.stats().density_run == 1


def test_animate_and_framepack_make_every_segment_a_run():
    case, pipe = CASES["wan-animate"], CASES["wan-animate"].make()
    frames = {"pose_video": [tiny_image(128, 128)] * 13, "face_video": [tiny_image(16, 16)] * 13}
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, **frames)
    stats = psa.stats()
    assert psa.stats().run == 2 and (stats.steps, stats.dense_steps) == (3, 2)
    case, pipe = CASES["framepack"], CASES["framepack"].make()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, num_frames=18)
    assert psa.stats().run == 2 and psa.stats().dense_steps == 2


def test_every_family_is_tested():
    assert len(TESTS) == len(HERE) and {tests.family for tests in TESTS} == set(HERE)
    transformers = {name: CASES[name].build().transformer for name in ONE_EACH}
    for name, transformer in transformers.items():
        assert find_family(transformer) is TESTS_OF[name].family
    known = sorted(name for family in HERE for name in family.transformers)
    assert sorted(type(transformer).__name__ for transformer in transformers.values()) == known


@pytest.mark.parametrize("name", ONE_EACH)
def test_norms_of_queries_and_keys_can_be_told_apart(name):
    """So that the tests above would see one in another's place."""
    transformer = CASES[name].make().transformer
    for attn in TESTS_OF[name].family.self_attentions(transformer).values():
        found = [getattr(attn, norm, None) for norm in NORMS]
        weights = [norm.weight for norm in found if norm is not None]
        assert all(not torch.equal(*pair) for pair in itertools.combinations(weights, 2))


def test_names_of_cases_are_their_own():
    assert len(CASES) == sum(len(tests.cases) for tests in TESTS)
    assert len(SAVED) == sum(len(tests.saved) for tests in TESTS)
    assert len(PARALLEL) == sum(len(tests.parallel) for tests in TESTS)


def test_families_that_can_be_split_have_cases_of_several_ranks():
    transformers = {name: CASES[name].build().transformer for name in ONE_EACH}
    plans = {name: TESTS_OF[name].family.parallel_plan(transformer) for name, transformer in transformers.items()}
    split = {TESTS_OF[name].family for name, plan in plans.items() if plan is not None}
    assert split == {tests.family for tests in TESTS if tests.parallel}
