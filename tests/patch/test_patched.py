"""disable_psa and psa_stats find the patch on the pipeline, whichever way it was put there."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers import NotPatchedError, PSAProcessor, UnsupportedModelError, apply_psa, disable_psa, psa_stats
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_wan
from psa_testing.wan_latents import run

pytestmark = pytest.mark.usefixtures("one_thread")


def processors(pipe):
    return [each for part in (pipe.transformer, pipe.transformer_2) if part for each in part.attn_processors.values()]


@pytest.mark.parametrize("way", ["apply_psa", "set_attn_processor", "twice"])
def test_a_patch_without_its_handle(way):
    pipe = tiny_wan(num_layers=2)
    stock, before = run(pipe), processors(pipe)
    if way == "set_attn_processor":
        pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset()))
    else:
        apply_psa(pipe, preset())
    if way == "twice":
        apply_psa(pipe, preset(dense_steps=0.5))
    assert psa_stats(pipe).steps == 0, "not run yet"
    run(pipe)
    stats = psa_stats(pipe)
    assert stats.density_sparse < 0.5 and stats.dense_steps == (2 if way == "twice" else 1)
    disable_psa(pipe)
    assert processors(pipe) == before and torch.equal(run(pipe), stock)
    disable_psa(pipe)
    assert processors(pipe) == before


def test_both_experts_have_one_patch():
    pipe = tiny_wan(two_stage=True, num_layers=2)
    before = processors(pipe)
    psa = apply_psa(pipe, preset())
    run(pipe)
    assert psa_stats(pipe) == psa.stats() and len(psa_stats(pipe).layers) == 4
    disable_psa(pipe)
    assert processors(pipe) == before


def test_two_patches_are_both_undone_and_neither_is_taken_for_the_other():
    pipe = tiny_wan(two_stage=True, num_layers=2)
    before = processors(pipe)
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset()))
    pipe.transformer_2.set_attn_processor(PSAProcessor(pipe, preset()))
    with pytest.raises(NotPatchedError, match="WanPipeline has 2 patches; ask each PSAProcessor for its stats"):
        psa_stats(pipe)
    disable_psa(pipe)
    assert processors(pipe) == before


def test_what_is_not_patched_says_so():
    pipe = tiny_wan(num_layers=1)
    with pytest.raises(NotPatchedError, match=r"WanPipeline is not patched; call apply_psa\(pipe, ...\) first"):
        psa_stats(pipe)
    with apply_psa(pipe, preset()):
        pass
    with pytest.raises(NotPatchedError, match="not patched"):
        psa_stats(pipe)
    for ask in (psa_stats, disable_psa):
        with pytest.raises(UnsupportedModelError, match="WanTransformer3DModel has no transformer"):
            ask(pipe.transformer)


def test_a_patch_of_another_pipeline_is_neither_asked_nor_left_on_in_silence():
    pipe, other = tiny_wan(num_layers=2), tiny_wan(num_layers=2)
    before = processors(pipe)
    pipe.transformer.set_attn_processor(PSAProcessor(other, preset()))
    for ask in (psa_stats, disable_psa, lambda pipe: PSAProcessor(pipe, preset())):
        with pytest.raises(RuntimeError, match=r"made for another pipeline .* set the model's own processor"):
            ask(pipe)
    pipe.transformer.set_attn_processor(type(before[0])())
    with apply_psa(pipe, preset()) as psa:
        run(pipe)
        assert psa.stats().density_sparse < 0.5
