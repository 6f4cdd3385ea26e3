"""Calls prepared by shape: how many launches and pieces of memory they take, and at which addresses."""

from __future__ import annotations

from dataclasses import replace

import prepared_launches
import pytest
import torch

pytest.importorskip("triton")

from psa_kernels import AttentionSpec, BlockLists, pool_and_attend_hopper
from psa_kernels.backends import BACKENDS
from psa_kernels.call import make_call
from psa_kernels.pyramid import triton as pyramid
from psa_kernels.sparse import triton as portable
from psa_kernels.sparse.hopper import launch as hopper

SPEC = AttentionSpec()
BY_NAME = {backend.name: backend for backend in BACKENDS}


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins of the kernels, which compute nothing, by their order."""
    monkeypatch.setattr(hopper, "cache_bytes", lambda device: 1 << 20)
    pool, attend, clear, on_hopper = prepared_launches.stand_in(
        monkeypatch, (pyramid, "pool_kernel"), (portable, "attention_kernel"),
        (pool_and_attend_hopper, "pool_and_clear_kernel"), (hopper, "attention_kernel"),
    )  # fmt: skip
    return {"triton": [pool, attend], "hopper": [clear, on_hopper, attend]}


def make(answers, tokens=300, text=(3, 5), permuted=True, dtype=torch.bfloat16, spec=SPEC, head_dim=64):
    """A call, lists for it and its output. Calls that share `answers` are known to be alike."""
    count = sum(text)
    q, k = torch.randn(1, tokens + count, 2, 2, head_dim, dtype=dtype).unbind(2)
    v = torch.randn(1, tokens + count, 2, head_dim, dtype=dtype)
    permutation = torch.randperm(tokens) if permuted else None
    call = replace(make_call(q, k, v, spec, *text, permutation), answers=answers)
    blocks = call.key_blocks
    lists = BlockLists.from_levels(torch.zeros(1, 2, call.query_blocks, blocks, dtype=torch.int64), len(spec.levels))
    return call, lists, torch.empty_like(v)


def in_one_go(answers):
    """What calls that share these answers share."""
    [found] = [each for key, each in answers.items() if "in one go" in key]
    return found


def attend(backend, call, lists, out):
    keys = backend.pool_keys(call, False, alone=True)
    assert keys is None
    backend.attend(call, keys, lists, out)


@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
@pytest.mark.parametrize("text", [(0, 0), (3, 5)], ids=str)
@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_a_known_call_launches_each_kernel_once_at_the_addresses_of_its_tensors(
    name, text, permuted, kernels, monkeypatch
):
    answers, backend = {}, BY_NAME[name]
    attend(backend, *make(answers, text=text, permuted=permuted))
    assert [len(kernel.looked_at) for kernel in kernels[name]] == [1] * len(kernels[name])
    prepared = in_one_go(answers).prepared
    for _ in range(2):
        made = make(answers, text=text, permuted=permuted)
        work = torch.empty(prepared.starts[-1], dtype=torch.uint8)
        with monkeypatch.context() as same:
            same.setattr(torch, "empty", lambda *_, work=work, **__: work)
            by_addresses, from_tensors = [], []
            for found in (by_addresses, from_tensors):
                prepared._ready = found is by_addresses
                attend(backend, *made)
                found.extend(kernel.launches.pop() for kernel in kernels[name])
                assert not any(kernel.launches for kernel in kernels[name]), "each was launched once"
        assert by_addresses == from_tensors
        assert prepared._ready, "what was looked at again goes by addresses the next time"
    assert [len(kernel.looked_at) for kernel in kernels[name]] == [1] * len(kernels[name])


@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_a_call_allocates_its_memory_and_nothing_else(name, kernels, monkeypatch):
    answers, backend = {}, BY_NAME[name]
    attend(backend, *make(answers))
    made = make(answers)
    asked = prepared_launches.count_allocations(monkeypatch)
    attend(backend, *made)
    assert asked == ["empty"] and [len(kernel.launches) for kernel in kernels[name]] == [1] * len(kernels[name])


@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_tensors_between_multiples_of_16_bytes_are_looked_at(name, kernels):
    answers, backend = {}, BY_NAME[name]
    call, lists, out = make(answers)
    attend(backend, call, lists, out)
    shifted = torch.empty(out.numel() + 1, dtype=out.dtype)[1:].view(out.shape)
    attend(backend, call, lists, shifted)
    attend(backend, call, lists, out)
    pooling, *_, attention = kernels[name]
    assert len(pooling.looked_at) == 1 and len(pooling.launches) == 2, "the means are where they should be"
    looking = kernels[name][1]
    assert len(looking.looked_at) == 2 and len(looking.launches) == 1
    assert len(attention.looked_at) == 2 and len(attention.launches) == 1


def test_float16_needs_no_second_attention_on_hopper(kernels):
    answers = {}
    for _ in range(2):
        attend(BY_NAME["hopper"], *make(answers, dtype=torch.float16))
    assert [len(kernel.launches) for kernel in kernels["hopper"]] == [1, 1, 0]


def test_counters_of_a_call_on_hopper_are_its_own_and_cleared_by_its_first_launch(kernels):
    answers = {}
    call, lists, out = make(answers)
    attend(BY_NAME["hopper"], call, lists, out)
    attend(BY_NAME["hopper"], call, lists, out)
    clear, attention, again = kernels["hopper"]
    [clearing], [attending], [redoing] = clear.launches, attention.launches, again.launches
    counters, redo = attending[-2:]
    assert clearing[-1] == counters and redo == counters + 4 * hopper.COUNTERS == redoing[-1]
    found = in_one_go(answers)
    tiles, prepared = -(-300 // 128) * 2, found.prepared
    assert found.plan.counters == hopper.COUNTERS + tiles
    # Past the means of keys and of values, and inside the memory of the call.
    work = clearing[1]
    assert (
        counters == work + 2 * prepared.starts[1] and counters + 4 * found.plan.counters <= work + prepared.starts[-1]
    )
    assert clearing[4] == work + prepared.starts[1]


def test_nothing_to_pool_on_hopper_leaves_the_counters_to_pytorch(kernels, monkeypatch):
    spec, answers = AttentionSpec(levels=(1,), thresholds=(0.5,)), {}
    attend(BY_NAME["hopper"], *make(answers, permuted=False, spec=spec))
    made = make(answers, permuted=False, spec=spec)
    asked = prepared_launches.count_allocations(monkeypatch)
    attend(BY_NAME["hopper"], *made)
    assert asked == ["empty", "zeros"] and [len(kernel.launches) for kernel in kernels["hopper"]] == [0, 1, 1]


def test_rows_of_many_addresses_are_kept_up_to_a_bound(kernels, monkeypatch):
    monkeypatch.setattr(pool_and_attend_hopper, "KEPT_ROWS", 2)
    answers, made = {}, []
    for _ in range(6):
        made.append(make(answers))  # alive, so that no address comes twice
        attend(BY_NAME["hopper"], *made[-1])
    assert 1 <= len(in_one_go(answers).rows) <= 2


@pytest.mark.parametrize(("name", "similarity", "alone"), [("triton", (0.1, 0.1), True), ("triton", None, False)])
def test_a_pyramid_that_the_selection_reads_or_that_is_of_some_heads_is_pooled_before(name, similarity, alone, kernels):
    spec = AttentionSpec(similarity=similarity)
    call, _, _ = make({}, spec=spec)
    assert BY_NAME[name].pool_keys(call, True, alone) is not None
    assert (BY_NAME[name].pool_keys(call, False, alone) is None) == alone


@pytest.mark.parametrize("name", ["triton-int8", "hopper-int8"])
def test_integers_are_made_of_a_pyramid(name, kernels):
    call, _, _ = make({}, spec=AttentionSpec(precision="int8_qk"))
    assert BY_NAME[name].pool_keys(call, False, alone=True) is not None
