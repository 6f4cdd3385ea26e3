"""A `with` block leaves the pipeline as it was: patched, where another patch was there before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from psa_diffusers import PSAProcessor, apply_psa, disable_psa, psa_stats
from psa_testing.tiny_families import CASES, EVERYTHING, SPARSE

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = CASES["wan"]


def by_apply(pipe):
    return apply_psa(pipe, SPARSE, strict=True).processor


def by_processor(pipe):
    processor = PSAProcessor(pipe, SPARSE, strict=True)
    pipe.transformer.set_attn_processor(processor)
    return processor


@pytest.mark.parametrize("patch", [by_apply, by_processor])
def test_the_patch_of_before_comes_back(patch):
    pipe = WAN.make()
    outer = patch(pipe)
    sparse = WAN.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True) as inner:
        assert not torch.equal(WAN.run(pipe), sparse)
        with apply_psa(pipe, EVERYTHING, strict=True):
            pass
        assert inner.stats().density_sparse == 1 and pipe.transformer.blocks[0].attn1.processor is inner.processor
    assert torch.equal(WAN.run(pipe), sparse)
    assert psa_stats(pipe).density_sparse == outer.stats().density_sparse < 0.5
    outer.restore()
    assert torch.equal(WAN.run(pipe), WAN.stock)


@pytest.mark.parametrize("undo", [disable_psa, lambda pipe: None], ids=["all taken off", "the first given back"])
def test_what_was_taken_off_stays_off(undo):
    pipe = WAN.make()
    first = apply_psa(pipe, SPARSE)
    with apply_psa(pipe, EVERYTHING):
        undo(pipe)
        first.restore()
    assert torch.equal(WAN.run(pipe), WAN.stock)


def test_what_was_set_inside_stays():
    pipe = WAN.make()
    apply_psa(pipe, SPARSE)
    with apply_psa(pipe, EVERYTHING):
        last = by_processor(pipe)
    assert all(block.attn1.processor is last for block in pipe.transformer.blocks)


def test_patches_that_replace_each_other_do_not_pile_up():
    pipe = WAN.make()
    made = [weakref.ref(apply_psa(pipe, SPARSE).processor) for _ in range(5)]
    gc.collect()
    assert [each() is not None for each in made] == [False] * 4 + [True]
