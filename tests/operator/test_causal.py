"""Causal calls of the reference: against the maths written down token by token, dense attention, and parts of calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.backends.choose import choose
from psa_kernels.causal.layout import CausalLayout
from psa_testing.brute_force_causal import brute_force_causal

SPEC = AttentionSpec(block_query=16, block_key=8, importance=Importance(query_stride=4, key_stride=4))
EVERYTHING = replace(SPEC, levels=(1,), thresholds=(1.0,))
SPECS = {
    "psa-3": replace(SPEC, thresholds=(0.2, 0.4, 0.7)),
    "kept": replace(SPEC, keep_first=1, keep_last=2, thresholds=(0.0, 0.2, 0.4)),
    "mass, kept": replace(SPEC, rule="mass", thresholds=(0.3, 0.5, 0.8), keep_first=1, keep_last=1),
    "mass, floor, similarity": replace(
        SPEC, rule="mass", thresholds=(0.1, 0.5, 0.9), floor=0.2, similarity=(0.05, 0.0), keep_last=1
    ),
    "pooled, rest": replace(SPEC, rest="mean", importance=Importance("pooled", "mean", 8, 2)),
    "no level 1": replace(SPEC, levels=(2, 8), thresholds=(0.3, 0.6), importance=Importance("pooled", "max", 4, 8)),
}


def inputs(queries, keys=None, heads=(4, 2), *, batch=1, dtype=torch.float64):
    """Random q `[B, Nq, heads[0], 8]` and k, v `[B, Nk, heads[1], 8]`, views into wider tensors."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, h, 11) for n, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))]
    return [(1.5 * torch.randn(shape, dtype=torch.float64)).to(dtype)[..., :8] for shape in shapes]


def dense(q, k, v):
    """The queries are the last of the keys."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("queries", "keys"), [(80, 80), (61, 61), (33, 77), (9, 70), (1, 50)], ids=str)
def test_the_maths_written_down(name, queries, keys):
    q, k, v = inputs(queries, keys)
    options = {"text_before": 3, "text_after": 4, "scale": 0.5}
    out, stats, lists = psa_attention(
        q, k, v, SPECS[name], causal=True, return_stats=True, return_lists=True, **options
    )
    expected, density, levels = brute_force_causal(q, k, v, SPECS[name], **options)
    assert out.shape == q.shape and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.density.double(), density, rtol=1e-6, atol=1e-6)
    found = lists.levels()[0]
    for h in range(4):
        for index, row in enumerate(levels[0, h]):
            past = len(SPECS[name].levels)
            assert found[h, index].tolist()[: len(row)] == [past if level is None else level for level in row]
            assert (found[h, index, len(row) :] == past).all()


@pytest.mark.parametrize("heads", [(2, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (37, 100), (1, 1), (70, 71)], ids=str)
def test_everything_kept_is_dense_attention(queries, keys, heads):
    q, k, v = inputs(queries, keys, heads, batch=2)
    for spec in (EVERYTHING, replace(SPEC, rule="budget", density=1.0), replace(SPEC, keep_last=100)):
        out, stats = psa_attention(q, k, v, spec, causal=True, return_stats=True)
        torch.testing.assert_close(out, dense(q, k, v))
        assert stats.density.eq(1).all() and stats.coverage.eq(1).all()


@pytest.mark.parametrize(
    ("queries", "keys", "before", "after"),
    [(20, 20, 12, 8), (5, 30, 0, 8), (700, 700, 0, 700), (40, 90, 60, 8)],
    ids=str,
)
def test_text_is_exact(queries, keys, before, after):
    """Calls without video queries; and text queries of calls with them."""
    q, k, v = inputs(queries, keys)
    out = psa_attention(q, k, v, SPEC, causal=True, text_before=before, text_after=after)
    exact = dense(q, k, v)
    positions = torch.arange(keys - queries, keys)
    text = (positions < before) | (positions >= keys - after)
    torch.testing.assert_close(out[:, text], exact[:, text])


@pytest.mark.parametrize("name", [*SPECS, "budget"])
@pytest.mark.parametrize("changed", [17, 40, 79])
def test_no_output_depends_on_what_is_later(name, changed):
    """To the bit: with the same lists at every earlier token, and with its own at those of earlier query blocks."""
    spec = SPECS.get(name, replace(SPEC, rule="budget", density=0.4, keep_first=1))
    first = inputs(80, dtype=torch.float32)
    second = [x.clone() for x in first]
    for x in second:
        x[:, changed:] = 3 * torch.randn_like(x[:, changed:])
    out, lists = psa_attention(*first, spec, causal=True, return_lists=True)
    given = psa_attention(*second, spec, causal=True, lists=lists)
    assert torch.equal(given[:, :changed], out[:, :changed]) and not torch.equal(given[:, changed:], out[:, changed:])
    own, block = psa_attention(*second, spec, causal=True), changed // 16 * 16
    assert torch.equal(own[:, :block], out[:, :block])


@pytest.mark.parametrize("name", [*SPECS, "budget"])
@pytest.mark.parametrize("changed", [1, 17, 40, 79])
def test_later_keys_and_values_change_no_earlier_output(name, changed):
    """To the bit, also inside the query block of the token, for lists are chosen from what is before the diagonal."""
    spec = SPECS.get(name, replace(SPEC, rule="budget", density=0.4, keep_first=1))
    q, k, v = inputs(80, dtype=torch.float32)
    out, lists = psa_attention(q, k, v, spec, causal=True, return_lists=True)
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:, changed] = 3 * torch.randn_like(x[:, changed])
    found, new_lists = psa_attention(q, k, v, spec, causal=True, return_lists=True)
    assert torch.equal(found[:, :changed], out[:, :changed]) and not torch.equal(found[:, changed], out[:, changed])
    # The lists of its own row stay as well.
    rows = changed // 16 + 1
    assert torch.equal(new_lists.levels()[:, :, :rows], lists.levels()[:, :, :rows])


def test_blocks_that_are_later_are_never_read():
    q, k, v = inputs(80)
    out = psa_attention(q, k, v, SPEC, causal=True)
    for x in (q, k, v):
        x[:, 48:] = torch.nan
    poisoned = psa_attention(q, k, v, SPEC, causal=True)
    assert torch.equal(poisoned[:, :48], out[:, :48]) and poisoned[:, 48:].isnan().all()


@pytest.mark.parametrize("name", SPECS)
def test_a_later_chunk_is_the_end_of_the_whole_call(name):
    """Where it begins with a query block it chooses the same lists."""
    q, k, v = inputs(85)
    whole, lists = psa_attention(q, k, v, SPECS[name], causal=True, return_lists=True)
    part, part_lists = psa_attention(q[:, 48:], k, v, SPECS[name], causal=True, return_lists=True)
    torch.testing.assert_close(part, whole[:, 48:], rtol=1e-12, atol=1e-12)
    assert torch.equal(part_lists.levels(), lists.levels()[:, :, 3:])
    first = psa_attention(q[:, :48], k[:, :48], v[:, :48], SPECS[name], causal=True)
    torch.testing.assert_close(first, whole[:, :48], rtol=1e-12, atol=1e-12)


def test_a_budget_pays_for_kept_blocks_first():
    q, k, v = inputs(16 * 12)
    spec = replace(SPEC, rule="budget", density=0.3)
    for kept in ((0, 0), (1, 2), (4, 8)):
        spec = replace(spec, keep_first=kept[0], keep_last=kept[1])
        lists = select_blocks(q, k, spec, v=v, causal=True)
        for row in range(1, 12):
            level, blocks = lists.levels()[:, :, row, : 2 * row], 2 * row
            is_kept = torch.zeros(blocks, dtype=torch.bool)
            is_kept[: kept[0]] = True
            is_kept[max(blocks - kept[1], 0) :] = True
            assert (level[..., is_kept] == 0).all()
            cost = torch.tensor([1, 1 / 2, 1 / 4, 0])[level].sum(-1)
            # The most important block is never skipped.
            assert (cost <= max(0.3 * blocks, float(is_kept.sum()) + 0.25) + 1e-6).all()


def test_density_counts_the_diagonal_in_full():
    """12 rows of 0, 2, .. 22 blocks before the diagonal, of which half are listed, and 2 on it."""
    q, k, v = inputs(16 * 12)
    spec = replace(EVERYTHING, thresholds=(0.5,))
    stats = psa_attention(q, k, v, spec, causal=True, return_stats=True)[1]
    assert stats.density.tolist() == [pytest.approx([(66 + 24) / (132 + 24)] * 4)]
    assert torch.equal(stats.coverage, stats.density) and stats.level_shares[0, 0].item() == pytest.approx(66 / 156)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    q, k, v = inputs(61, dtype=dtype)
    wide = psa_attention(q.float(), k.float(), v.float(), SPECS["kept"], causal=True)
    torch.testing.assert_close(psa_attention(q, k, v, SPECS["kept"], causal=True), wide.to(dtype), rtol=0, atol=0)


MISTAKES = {
    "too few keys": ({}, (61, 60), {}, "causal=True: expected no fewer keys than queries, got 60 and 61"),
    "permutation": ({}, (61, 61), {"permutation": torch.arange(61)}, "causal=True: expected permutation=None"),
    "blocks": ({"block_query": 8, "block_key": 16}, (61, 61), {}, "a multiple of block_key=16, got 8"),
    "precision": ({"precision": "int8_qk"}, (61, 61), {}, "causal=True: expected precision='native', got 'int8_qk'"),
    "text": ({}, (5, 61), {"text_before": 60, "text_after": 2}, "cannot hold text_before=60"),
    "kernel": ({}, (61, 61), {"implementation": "triton"}, "implementation='triton': (device cpu|.*triton is not)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_thing_its_value_and_what_is_allowed(name):
    fields, tokens, options, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        psa_attention(*inputs(*tokens), replace(SPEC, **fields), causal=True, **options)


def test_kept_blocks_are_refused_where_they_would_mean_nothing():
    with pytest.raises(ValueError, match="keep_first=1: expected 0 without causal=True"):
        psa_attention(*inputs(61), replace(SPEC, keep_first=1))
    with pytest.raises(ValueError, match=r"keep_last=2: expected 0 where levels=\(2, 4\) begin with another than 1"):
        replace(SPEC, levels=(2, 4), thresholds=(0.3, 0.6), keep_last=2)
    with pytest.raises(ValueError, match="keep_first=-1: expected a number of blocks"):
        replace(SPEC, keep_first=-1)


def test_lists_of_a_call_that_is_not_causal_are_refused():
    q, k, v = inputs(64)
    spec = replace(SPEC, rule="mass", thresholds=(0.4, 0.6, 0.9))
    lists = select_blocks(q, k, spec)
    with pytest.raises(ValueError, match="lists: made for another call: row 0 lists blocks that are not past"):
        psa_attention(q, k, v, spec, causal=True, lists=lists)


def causal_call(on_a_gpu, spec, **options):
    """A call on a pretended GPU, its queries the last of the keys."""
    call = on_a_gpu(spec, **options)
    return replace(call, causal=CausalLayout(0, call.q.shape[1], 0, 0, spec.block_query, spec.block_key))


def test_on_a_gpu_without_a_kernel_the_reference_has_to_be_asked_for(on_a_gpu):
    call = causal_call(on_a_gpu, AttentionSpec(), head_dim=512, capability=(8, 0))
    for strict in (False, True):
        with pytest.raises(ValueError, match=r"causal=True on cuda: the triton kernel .*'reference' computes it"):
            choose(call, "auto", strict)
    assert choose(call, "reference").name == "reference"


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_a_kernel_serves_it_on_a_gpu(on_a_gpu, capability, recwarn):
    pytest.importorskip("triton")
    call = causal_call(on_a_gpu, AttentionSpec(), capability=capability)
    expected = "hopper" if capability == (9, 0) else "triton"
    assert choose(call, "auto", strict=True).name == expected
    assert not recwarn
