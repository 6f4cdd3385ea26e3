"""Guiders that change a forward: they skip blocks, attention or its scores, or blur queries, by hooks of diffusers.

What stock computes under such a hook is what a patched model computes: in perturbed forwards, and in no others.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import (
    AutoGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_testing.families import CASES
from psa_testing.modular_pipelines import MODULAR
from psa_testing.tiny_families import EVERYTHING, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = {"skip_attention": True, "skip_ff": True}
ATTENTION = {"skip_attention": True, "skip_ff": False}
SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
QUERIES = {}
HOOK = "guider"


class Smoothed(SmoothedEnergyGuidance):
    """Counts the models that it prepares, as the others do: that of diffusers 0.42 does not, and never takes effect."""

    def prepare_models(self, denoiser):
        self._count_prepared += 1
        super().prepare_models(denoiser)


@pytest.fixture
def known(monkeypatch):
    """Tells diffusers of the processors of a transformer, most of which its guiders do not know."""

    def tell(transformer):
        AttentionProcessorRegistry._register()
        for attn in find_family(transformer).self_attentions(transformer).values():
            found = AttentionProcessorMetadata(lambda attn, hidden_states, *args, **kwargs: hidden_states)
            monkeypatch.setitem(AttentionProcessorRegistry._registry, type(attn.processor), found)

    return tell


def perturb(transformer, blocks, skip):
    """Set a guider's hooks on the first block of a list."""
    if skip == QUERIES:
        _apply_smoothed_energy_guidance_hook(transformer, SmoothedEnergyGuidanceConfig([0], fqn=blocks), 1.0, HOOK)
    else:
        _apply_layer_skip_hook(transformer, LayerSkipConfig([0], fqn=blocks, **skip), HOOK)


def undo(transformer):
    transformer._diffusers_hook.remove_hook(HOOK, recurse=True)


@pytest.mark.parametrize(
    ("name", "blocks", "skip"),
    [
        ("wan", "blocks", BLOCK),
        ("wan", "blocks", ATTENTION),
        ("wan", "blocks", SCORES),
        ("wan", "blocks", QUERIES),
        ("ltx", "transformer_blocks", BLOCK),
        ("mochi", "transformer_blocks", BLOCK),
        ("allegro", "transformer_blocks", SCORES),
        # Text and video are projected by one module, and blurred together.
        ("cogvideox-5b", "transformer_blocks", QUERIES),
        ("cogvideox-5b", "transformer_blocks", SCORES),
        ("hunyuan-video", "transformer_blocks", QUERIES),
        ("hunyuan-video", "single_transformer_blocks", QUERIES),
        ("hunyuan-video", "transformer_blocks", SCORES),
        ("hunyuan-video", "single_transformer_blocks", SCORES),
        ("hunyuan-video-1.5", "transformer_blocks", SCORES),
        ("hunyuan-video-1.5", "transformer_blocks", QUERIES),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "queries",
)
def test_a_perturbed_model_equals_stock_that_is_perturbed(name, blocks, skip, known):
    case, pipe = CASES[name], CASES[name].make()
    known(pipe.transformer)
    plain = case.run(pipe)
    perturb(pipe.transformer, blocks, skip)
    stock = case.run(pipe)
    assert float((stock - plain).abs().max()) > 1e-2
    undo(pipe.transformer)
    with apply_psa(pipe, EVERYTHING, strict=True) as psa:
        # Set on the patched model, as guiders do in every step.
        perturb(pipe.transformer, blocks, skip)
        assert_equal_to_rounding(case.run(pipe), stock)
        left_out = [
            layer for layer, value in zip(psa.stats().layers, psa.stats().density[-1], strict=True) if value is None
        ]
        assert left_out == ([] if skip == QUERIES else [next(x for x in psa.stats().layers if x.startswith(blocks))])
        undo(pipe.transformer)
        assert_equal_to_rounding(case.run(pipe), plain)
        assert all(value == 1 for value in psa.stats().density[-1])
    assert torch.equal(case.run(pipe), plain)


def guiders():
    """One of each kind, which perturbs the second of Wan's two blocks, in some of them not at the first step."""
    always = {"guidance_scale": 3.0}
    config = LayerSkipConfig([1], fqn="blocks", **BLOCK)
    return {
        "skip-layer": SkipLayerGuidance(
            skip_layer_config=config, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, **always
        ),
        "perturbed-attention": PerturbedAttentionGuidance(
            perturbed_guidance_config=LayerSkipConfig([1], fqn="blocks", **SCORES),
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=1.0,
            **always,
        ),
        "smoothed-energy": Smoothed(
            seg_guidance_config=SmoothedEnergyGuidanceConfig([1], fqn="blocks"),
            seg_blur_sigma=1.0,
            **always,
        ),
        "auto": AutoGuidance(auto_guidance_config=LayerSkipConfig([1], fqn="blocks", **BLOCK), **always),
    }


# Forwards of a step, and in how many of them the second block computes attention.
FORWARDS = {"skip-layer": (3, 2), "perturbed-attention": (3, 2), "smoothed-energy": (3, 3), "auto": (2, 1)}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_guider_perturbs_the_forwards_that_it_does_in_stock(name, known):
    case, pipe = MODULAR["wan"], MODULAR["wan"].make()
    known(pipe.transformer)
    plain = case.run(pipe)
    pipe.update_components(guider=guiders()[name])
    stock = case.run(pipe)
    assert float((stock - plain).abs().max()) > 1e-2
    with apply_psa(pipe, preset(dense_steps=1.0)):
        assert torch.equal(case.run(pipe), stock)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(case.run(pipe), stock)
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        sparse = case.run(pipe)
        notes = psa.processor._runs._run.notes
    assert sparse.isfinite().all() and float((sparse - stock).abs().max()) > 1e-3
    assert (psa.stats().steps, psa.stats().dense_steps, psa.stats().fallbacks) == (4, 2, {})
    forwards, attended = FORWARDS[name]
    calls = [[note.layer for note in forward] for forward in notes if forward and forward[0].step == 3]
    assert len(calls) == forwards and calls.count(["blocks.0", "blocks.1"]) == attended
    assert calls.count(["blocks.0"]) == forwards - attended
    assert torch.equal(case.run(pipe), stock)


def test_a_compiled_block_gives_values_where_stock_does(known):
    """Stock's is not one graph then, which cannot hold what replaces attention by its values."""
    case, pipe = CASES["wan"], CASES["wan"].make()
    known(pipe.transformer)
    once = {"num_inference_steps": 1, "guidance_scale": 1.0}
    plain = case.run(pipe, **once)
    perturb(pipe.transformer, "blocks", SCORES)
    stock = case.run(pipe, **once)
    undo(pipe.transformer)
    torch._dynamo.reset()
    pipe.transformer.blocks[0].compile(backend="eager")
    try:
        with apply_psa(pipe, EVERYTHING, strict=True) as psa:
            assert_equal_to_rounding(case.run(pipe, **once), plain)
            perturb(pipe.transformer, "blocks", SCORES)
            assert_equal_to_rounding(case.run(pipe, **once), stock)
            assert psa.stats().density[-1] == [None, 1.0]
            undo(pipe.transformer)
            assert_equal_to_rounding(case.run(pipe, **once), plain)
    finally:
        torch._dynamo.reset()


def test_a_processor_that_guiders_do_not_know_is_told_of_when_it_is_asked():
    """As of a model that is not patched, and only where they need to know of it."""
    case, pipe = CASES["wan"], CASES["wan"].make()
    with apply_psa(pipe, EVERYTHING, strict=True):
        perturb(pipe.transformer, "blocks", ATTENTION)
        with pytest.raises(ValueError, match="WanAttnProcessor'> not registered"):
            case.run(pipe)
