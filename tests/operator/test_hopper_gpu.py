"""The attention kernel for Hopper against its portable twin and float64, on random inputs and on hostile ones."""

from __future__ import annotations

import gc
import math
import random

import pytest
import torch
from gpu_checks import poison_free_memory, random_call, relative_error

from psa_kernels import AttentionSpec, BlockLists, head_groups, psa_attention
from psa_kernels.layout import make_layout

pytest.importorskip("triton")
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")]


def random_lists(batch, heads, query_blocks, key_blocks, levels):
    """Every block at a random level or skipped, no row empty."""
    chosen = torch.randint(0, levels + 1, (batch, heads, query_blocks, key_blocks), device="cuda")
    chosen[..., random.randrange(key_blocks)] = random.randrange(levels)
    return BlockLists.from_levels(chosen, levels)


def random_case(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, spec, before, after, video, keys, permutation = random_call(chance)
    dtype = chance.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    batch, heads, gap = chance.choice([1, 2]), chance.choice([1, 3]), chance.choice([0, 8])
    q, k, v = (
        (1.5 * torch.randn(batch, n + before + after, heads, head_dim + gap, device="cuda")).to(dtype)[..., :head_dim]
        for n in (video, keys, keys)
    )
    lists = random_lists(
        batch, heads, math.ceil(video / spec.block_query), math.ceil(keys / spec.block_key), len(spec.levels)
    )
    return q, k, v, spec, lists, {"text_before": before, "text_after": after, "permutation": permutation}


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_portable_kernel_to_rounding(seed):
    q, k, v, spec, lists, options = random_case(seed)
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    found = {}
    for name in ("hopper", "triton"):
        poison_free_memory()
        found[name], stats = psa_attention(
            q, k, v, spec, lists=lists, implementation=name, return_stats=True, **options
        )
        assert stats.implementation == name
    # Relative to the row's largest weight the largest weight, 1, is exact. Relative to another it is rounded too.
    assert relative_error(found["hopper"], expected) <= 1.4 * relative_error(found["triton"], expected)
    poison_free_memory()
    again = psa_attention(q, k, v, spec, lists=lists, implementation="hopper", **options)
    assert torch.equal(again, found["hopper"])


@pytest.mark.parametrize("implementation", ["hopper", "triton"])
@pytest.mark.parametrize("given", [True, False], ids=["given lists", "selects"])
@pytest.mark.parametrize("seed", range(12))
def test_groups_of_heads_change_nothing(seed, given, implementation, monkeypatch):
    q, k, v, spec, lists, options = random_case(seed)
    call = {"lists": lists if given else None, "implementation": implementation, "return_stats": True, **options}
    whole, stats = psa_attention(q, k, v, spec, **call)
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(head_groups, "LARGEST_SHARE", 0)
    poison_free_memory()
    done = []
    out, video = torch.full_like(whole, float("nan")), slice(options["text_before"], q.shape[1] - options["text_after"])

    def note(heads):
        done.append((heads, out[:, video, : heads.stop].clone()))

    parts, part_stats = psa_attention(q, k, v, spec, out=out, heads_done=note, **call)
    assert torch.equal(parts, whole) and torch.equal(part_stats.level_shares, stats.level_shares)
    assert [heads.stop for heads, _ in done] == list(range(1, q.shape[2] + 1))
    for heads, found in done:  # each was copied by a kernel right behind those that filled it
        assert torch.equal(found, whole[:, video, : heads.stop])


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(rule="budget", density=0.25)], ids=["count", "budget"])
def test_pyramids_take_no_more_memory_than_is_said(spec, monkeypatch):
    """Those of all heads would take 3 1/2 times the memory of the output, as tokens are permuted."""
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 0)
    tokens, heads, head_dim = 16_384, 40, 128
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    call = {"permutation": torch.randperm(tokens, device="cuda"), "implementation": "hopper"}
    psa_attention(q, k, v, spec, **call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    psa_attention(q, k, v, spec, **call)
    extra = torch.cuda.max_memory_allocated() - before
    rest = 2**26  # lists, importance, representatives and the like
    assert q.nbytes < extra < q.nbytes + head_groups.LARGEST_SHARE * q.nbytes + rest


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_sum_exp(head_dim, dtype):
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.sparse.hopper import launch as hopper

    tokens, heads, spec = 1100, 2, AttentionSpec()
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    layout = make_layout(tokens, tokens, 0, 0, None)
    every_block = torch.zeros(
        1, heads, math.ceil(tokens / 128), math.ceil(tokens / 64), device="cuda", dtype=torch.int64
    )
    lists = BlockLists.from_levels(every_block, 3)
    lse = torch.full((1, heads, tokens), torch.nan, device="cuda")
    hopper.sparse_attention(q, build_pyramid(k, v, layout, spec), lists, layout, spec, head_dim**-0.5, lse)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * head_dim**-0.5
    assert (lse - logits.logsumexp(-1)).abs().max() < 1e-3


@pytest.mark.parametrize("given", [True, False], ids=["rows of unequal length", "rows of equal length"])
def test_waiting_for_other_programs_changes_nothing(given, monkeypatch):
    """With 8 items a program, and heads that the cache would hold."""
    from psa_kernels.sparse.hopper import launch as hopper

    tokens, heads, spec = 5000, 27, AttentionSpec()
    q, k, v = (torch.randn(1, tokens, heads, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    blocks = math.ceil(tokens / 128), math.ceil(tokens / 64)
    call = {"lists": random_lists(1, heads, *blocks, 3) if given else None, "implementation": "hopper"}
    found = []
    for waits in (False, True):
        monkeypatch.setattr(hopper, "keeps_in_step", lambda *_, waits=waits: waits)
        poison_free_memory()
        found.append(psa_attention(q, k, v, spec, **call))
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_a_program_does_not_wait_for_ever():
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    from psa_kernels.sparse.hopper.step import wait_for_others

    @gluon.jit
    def wait(counter_ptr, left_ptr):
        gl.store(left_ptr, wait_for_others(counter_ptr, 50, 1000, 200))

    for reported, left in ((45, 0), (46, 200)):  # Four are not waited for.
        counter = torch.full((1,), reported, dtype=torch.int32, device="cuda")
        found = torch.full((1,), -1, dtype=torch.int32, device="cuda")
        wait[(1,)](counter, found, num_warps=1)
        assert found.item() == left


def hostile_inputs(name):
    """Queries and keys whose later blocks exceed the first ones by more than any exponent holds."""
    tokens, heads, head_dim = 4096, 2, 128
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if name.startswith("later logits"):
        direction = torch.ones(head_dim, device="cuda") / head_dim**0.5
        q = (0.1 * q + 4 * direction).to(q.dtype)
        k[:, 3000:] = (k[:, 3000:] + direction * float(name.split()[-1]) * head_dim**0.5 / 4).to(k.dtype)
    elif name == "equal logits":
        k = k[:, :1].expand_as(k)
    elif name == "one huge key at the end":
        k[:, -1] *= 300
    elif name == "weights times values":
        # The sum of the weights stays finite, their product with the values would not.
        q, k = (0.0 * q + 1).to(q.dtype), (0.01 * k).to(k.dtype)
        k[:, 2048:] += 5.0
        v = (v * 1e30).to(v.dtype)
    return q, k, v


HOSTILE = ["later logits 60", "later logits 200", "later logits 2000", "equal logits", "one huge key at the end"]


@pytest.mark.parametrize("name", [*HOSTILE, "weights times values"])
def test_sums_that_run_over_are_computed_again(name):
    """Fails without the guard: what it finds then is infinite or not a number."""
    q, k, v = hostile_inputs(name)
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    lists = random_lists(1, 2, 32, 64, 3)
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference")
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton")
    found = psa_attention(q, k, v, spec, lists=lists, implementation="hopper")
    assert relative_error(found, expected) <= 1.4 * relative_error(portable, expected)


@pytest.mark.parametrize("name", ["later logits 200", "later logits 2000", "weights times values"])
def test_the_guard_is_needed(name, monkeypatch):
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.sparse.hopper import launch as hopper

    q, k, v = hostile_inputs(name)
    spec, layout = AttentionSpec(thresholds=(0.3, 0.5, 0.9)), make_layout(q.shape[1], q.shape[1], 0, 0, None)
    monkeypatch.setattr(hopper.portable, "launch", lambda *_, **__: None)
    found = hopper.sparse_attention(
        q, build_pyramid(k, v, layout, spec), random_lists(1, 2, 32, 64, 3), layout, spec, q.shape[3] ** -0.5
    )
    assert not found.isfinite().all()


def test_no_call_waits_for_the_device_or_keeps_memory():
    q, k, v, spec, lists, options = random_case(1)
    call = {"lists": lists, "return_stats": True, "implementation": "hopper", **options}
    psa_attention(q, k, v, spec, **call)
    torch.cuda.synchronize()
    gc.collect()  # What earlier tests left must not be freed in between.
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            psa_attention(q, k, v, spec, **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    assert torch.cuda.memory_allocated() == before
