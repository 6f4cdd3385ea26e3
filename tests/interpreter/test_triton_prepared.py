"""Calls whose launches are prepared: by addresses alone they give to the last bit what they give from tensors."""

from __future__ import annotations

from dataclasses import replace

import prepared_launches
import pytest
import torch

from psa_kernels import AttentionSpec, pool_and_attend_hopper
from psa_kernels.attention import _attend
from psa_kernels.backends import BACKENDS
from psa_kernels.call import make_call
from psa_kernels.importance import representatives
from psa_kernels.importance import triton as triton_importance
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import triton as triton_pyramid
from psa_kernels.sparse import triton as triton_sparse

[PORTABLE] = [backend for backend in BACKENDS if backend.name == "triton"]
SPECS = {
    "levels": AttentionSpec(block_query=64, block_key=16, levels=(1, 2, 8), thresholds=(0.2, 0.5, 0.8)),
    "mean of the rest": AttentionSpec(block_query=64, block_key=16, levels=(2, 4), thresholds=(0.3, 0.6), rest="mean"),
    "nothing to pool": AttentionSpec(block_query=64, block_key=16, levels=(1,), thresholds=(0.6,)),
    "mass, cap": AttentionSpec(
        block_query=64, block_key=16, levels=(1, 4), rule="mass", thresholds=(0.6, 0.9), similarity=(0.0,)
    ),
}


def inputs(tokens, heads=2, dim=16):
    """Queries and keys of one tensor, and values of another, so that strides differ."""
    q, k = torch.randn(1, tokens, 2, heads, dim).unbind(2)
    return q, k, torch.randn(1, tokens, heads, dim)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
def test_a_call_by_addresses_gives_what_one_from_tensors_gives(name, permuted, monkeypatch, poisoned_memory):
    pool, attend = prepared_launches.stand_in(
        monkeypatch, (triton_pyramid, "pool_kernel"), (triton_sparse, "attention_kernel"), computes=True
    )
    spec, text, answers = SPECS[name], (2, 3), {}
    for turn in range(2):
        q, k, v = inputs(45)
        permutation = torch.randperm(40) if permuted else None
        call = replace(make_call(q, k, v, spec, *text, permutation), answers=answers)
        out, expected = torch.empty_like(v), torch.empty_like(v)
        lists = _attend(call, PORTABLE, None, out, alone=True)
        fresh = replace(call, answers={})
        looked_at = len(pool.looked_at), len(attend.looked_at)
        PORTABLE.attend(fresh, triton_pyramid.build_pyramid(k, v, call.layout, spec), lists, expected)
        video = slice(text[0], -text[1])
        assert torch.equal(out[:, video], expected[:, video]) and out[:, video].isfinite().all()
        pools = name != "nothing to pool"
        assert looked_at == ((0, 0) if turn else (pools, 1)), "the first call alone is looked at"
        assert (len(pool.launches), len(attend.launches)) == ((pools, 1) if turn else (0, 0))
        pool.looked_at.clear(), attend.looked_at.clear()


@pytest.mark.parametrize("pooled", [False, True], ids=["sampled", "pooled"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "key_heads"), [(150, 150, 2, 2), (70, 400, 4, 2), (300, 20, 1, 1)]
)
def test_tiles_of_queries_and_keys_are_those_of_each_alone(queries, keys, heads, key_heads, pooled, poisoned_memory):
    q, k = torch.randn(2, queries + 5, heads, 16), torch.randn(2, keys + 5, 3, key_heads, 16)[:, :, 1]
    permutation = torch.randperm(queries) if queries == keys else None
    layout, steps = make_layout(queries + 5, keys + 5, 2, 3, permutation), (4, 2)
    rows, columns = (2, 4, 2, 8), (4, 2, 4, 1, 1, 2)
    *shapes, launch = representatives.tiling_of_both(
        (q.shape, k.shape), (q.stride(), k.stride()), q.dtype, q.device, 2, 3, permutation is not None, steps, pooled,
        rows, columns,
    )  # fmt: skip
    found = [torch.empty(shape) for shape in shapes]
    launch(q, k, *found, layout.short_permutation)
    settings = ((rows, representatives.NATURAL_ROWS), (columns, representatives.NATURAL_COLUMNS))
    for tiles, x, step, how in zip(found, (q, k), steps, settings, strict=True):
        assert torch.equal(tiles, representatives.in_tiles(x, layout, step, pooled, *how))


def test_importance_by_addresses_is_that_from_tensors(monkeypatch, poisoned_memory):
    kernels = prepared_launches.stand_in(
        monkeypatch, (representatives, "tiles_kernel"), (triton_importance, "importance_kernel"), computes=True
    )
    monkeypatch.setattr(triton_importance, "tiling_of_both", representatives.tiling_of_both.__wrapped__)
    spec, known = AttentionSpec(block_query=64, block_key=16), {}
    for turn in range(2):
        q, k, _ = inputs(45)
        layout = make_layout(45, 45, 2, 3, torch.randperm(40))
        found = triton_importance.block_importance(q, k, layout, spec, 0.3, known)
        assert [(len(kernel.looked_at), len(kernel.launches)) for kernel in kernels] == [(1 - turn, turn)] * 2
        expected = triton_importance.block_importance(q, k, layout, spec, 0.3)
        assert torch.equal(found, expected) and found.isfinite().all()
        for kernel in kernels:
            kernel.looked_at.clear()


@pytest.mark.parametrize("counters", [1, 128, 1000])
def test_integers_are_cleared_where_rows_are_pooled(counters, poisoned_memory):
    _, k, v = inputs(75)
    layout = make_layout(75, 75, 1, 2, torch.randperm(72))
    shape, pooling = triton_pyramid.prepare_both(k, v, layout, (1, 2, 8))
    assert pooling is not None
    expected, _, expected_values = triton_pyramid.pool_both(k, v, layout, (1, 2, 8))
    keys, values = torch.empty(shape), torch.empty(shape)
    counted = torch.full((counters + 8,), 5, dtype=torch.int32)
    launch = pooling.with_more(pool_and_attend_hopper.pool_and_clear_kernel, counters)
    launch(k, keys, None, v, values, layout.short_permutation, counted)
    assert torch.equal(keys, expected) and torch.equal(values, expected_values)
    assert not counted[:counters].any() and (counted[counters:] == 5).all()
