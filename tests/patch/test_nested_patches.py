"""A `with` block leaves the pipeline as it was: patched, where another patch was there before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from psa_diffusers import PSAProcessor, apply_psa, disable_psa, psa_stats
from psa_testing.tiny_families import CASES, EVERYTHING, SPARSE
from psa_testing.tiny_pipelines import tiny_wan

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


@pytest.mark.parametrize("patch", [by_apply, by_processor])
@pytest.mark.parametrize("runs", [0, 1])
def test_a_patch_comes_back_that_nobody_has_kept(patch, runs):
    pipe = WAN.make()
    assert patch(pipe) is not None
    sparse = WAN.run(pipe) if runs else None
    with apply_psa(pipe, EVERYTHING, strict=True):
        gc.collect()
        WAN.run(pipe)
    again = WAN.run(pipe)
    assert psa_stats(pipe).density_sparse < 0.5 and (sparse is None or torch.equal(again, sparse))


@pytest.mark.parametrize("end", [lambda psa, pipe: psa.restore(), lambda psa, pipe: disable_psa(pipe)])
def test_a_patch_that_cannot_come_back_is_forgotten(end):
    pipe = WAN.make()
    first = weakref.ref(by_apply(pipe))
    second = apply_psa(pipe, EVERYTHING)
    end(second, pipe)
    gc.collect()
    assert first() is None
    with second:
        pass
    assert torch.equal(WAN.run(pipe), WAN.stock)


@pytest.mark.parametrize("keep", [False, True], ids=["no handle", "the last handle"])
def test_patches_that_replace_each_other_do_not_pile_up(keep):
    """The last handle keeps what it has replaced, and no more."""
    pipe, made, psa = tiny_wan(num_layers=1), [], None
    for _ in range(100):
        psa = apply_psa(pipe, SPARSE)
        made.append(weakref.ref(psa.processor))
        if not keep:
            del psa
    gc.collect()
    assert [place for place, each in enumerate(made) if each() is not None] == ([98, 99] if keep else [99])


def test_a_handle_keeps_no_transformer():
    pipe = tiny_wan(num_layers=1)
    by_apply(pipe)
    psa, transformer = apply_psa(pipe, SPARSE), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert transformer() is None
    psa.restore()
