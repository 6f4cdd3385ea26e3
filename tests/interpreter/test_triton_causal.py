"""The Triton kernels of causal calls, in Triton's interpreter.

Memory that is not initialized holds what is no number, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from psa_kernels import AttentionSpec, Importance, head_groups, psa_attention, select_blocks
from psa_kernels.allocation import triton_boundaries
from psa_kernels.blocks import ranks_below
from psa_kernels.call import make_call
from psa_kernels.causal import lists as causal_lists
from psa_kernels.causal import triton_importance, triton_select
from psa_kernels.causal.lists import _importance, _key_representatives
from psa_testing.brute_force_causal import brute_force_causal

# Whatever a kernel leaves unwritten shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SPEC = AttentionSpec(block_query=64, block_key=16, thresholds=(0.2, 0.4, 0.8), importance=Importance(key_stride=8))
SPECS = {
    "psa-3": SPEC,
    "kept": replace(SPEC, keep_first=1, keep_last=2, thresholds=(0.0, 0.2, 0.4)),
    "everything kept": replace(SPEC, keep_last=100, thresholds=(0.0, 0.0, 0.1)),
    "mass": replace(SPEC, rule="mass", thresholds=(0.3, 0.5, 0.8), keep_first=1, keep_last=1, floor=0.1),
    "mass, similarity": replace(SPEC, rule="mass", similarity=(0.05, 0.0), thresholds=(0.0, 0.5, 1.0)),
    "budget": replace(SPEC, rule="budget", density=0.4),
    "budget, kept": replace(SPEC, rule="budget", density=0.2, keep_first=1, keep_last=2),
    "mean": replace(SPEC, rest="mean", importance=Importance("pooled", "mean", 8, 8)),
    "budget, mean": replace(SPEC, rule="budget", density=0.4, rest="mean", levels=(1, 4)),
    "one level": replace(SPEC, levels=(2,), thresholds=(0.6,), block_key=32),
    "five levels": replace(SPEC, levels=(1, 2, 4, 8, 16), thresholds=(0.1, 0.3, 0.5, 0.6, 0.8)),
}


def inputs(queries, keys=None, heads=(2, 1), *, batch=1, head_dim=16, dtype=torch.float32):
    """Random q `[B, Nq, heads[0], D]` and k, v `[B, Nk, heads[1], D]`, views into wider tensors."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, h, head_dim + 3) for n, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))]
    return [(1.5 * torch.randn(shape)).to(dtype)[..., :head_dim] for shape in shapes]


def inputs_without_near_ties(queries, keys, spec, before, after, **shape):
    """Random inputs whose lists stay as they are where importance is off by more than the kernel rounds it, 0.1 %."""
    call = {"causal": True, "text_before": before, "text_after": after, "implementation": "reference"}
    exact = causal_lists._importance

    def off(*arguments):
        found = exact(*arguments)
        return found * (1 + 3e-3 * (2 * torch.rand_like(found) - 1))

    while True:
        q, k, v = inputs(queries, keys, **shape)
        levels = select_blocks(q, k, spec, v=v, **call).levels()
        with pytest.MonkeyPatch.context() as changed:
            changed.setattr(causal_lists, "_importance", off)
            others = [select_blocks(q, k, spec, v=v, **call).levels() for _ in range(8)]
        if spec.rule == "budget" or all(torch.equal(levels, each) for each in others):
            return q, k, v


def attention_error(q, k, v, spec, **options):
    """Largest difference from the reference with the same lists."""
    call = {"causal": True, **options}
    out, stats, lists = psa_attention(
        q, k, v, spec, return_stats=True, return_lists=True, implementation="triton", **call
    )
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **call)
    assert stats.implementation == "triton" and out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
    return (out.double() - expected).abs().max().item()


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [*((name, 77, 270) for name in SPECS), *((name, 150, 150) for name in ("psa-3", "mass", "budget, kept", "mean"))],
    ids=str,
)
def test_lists_and_statistics_are_those_of_the_reference(name, queries, keys):
    q, k, v = inputs_without_near_ties(queries, keys, SPECS[name], 3, 4)
    options = {"causal": True, "text_before": 3, "text_after": 4, "return_stats": True, "return_lists": True}
    out, stats, lists = psa_attention(q, k, v, SPECS[name], implementation="triton", **options)
    expected, its_stats, its_lists = psa_attention(q, k, v, SPECS[name], implementation="reference", **options)
    found, known = lists.levels(), its_lists.levels()
    if "budget" in name:
        # Prices are rounded to steps, which two sums in different orders may do differently.
        assert (found != known).float().mean() <= 0.02
    else:
        assert torch.equal(found, known)
    if torch.equal(found, known):
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)
        assert torch.equal(stats.density, its_stats.density) and torch.equal(stats.coverage, its_stats.coverage)
    else:
        assert attention_error(q, k, v, SPECS[name], text_before=3, text_after=4) < 2e-5
    assert lists.ids.shape[3] <= its_lists.ids.shape[3]


@pytest.mark.parametrize("name", ["psa-3", "mass"])
def test_the_maths_written_down(name):
    q, k, v = inputs_without_near_ties(21, 150, SPECS[name], 2, 3, head_dim=8)
    out, lists = psa_attention(
        q, k, v, SPECS[name], causal=True, text_before=2, text_after=3, implementation="triton", return_lists=True
    )
    expected, _, levels = brute_force_causal(q, k, v, SPECS[name], text_before=2, text_after=3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    for h in range(2):
        for index, row in enumerate(levels[0, h]):
            wanted = [len(SPEC.levels) if level is None else level for level in row]
            assert lists.levels()[0, h, index].tolist()[: len(row)] == wanted


@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (2, 2)], ids=str)
def test_heads_that_share_keys(heads):
    assert attention_error(*inputs(100, 140, heads, batch=2), SPEC) < 2e-5


@pytest.mark.parametrize(
    ("head_dim", "dtype", "bound"),
    [(40, torch.float16, 4e-3), (128, torch.float16, 4e-3), (160, torch.float32, 2e-5), (256, torch.float16, 4e-3)],
    ids=str,
)
def test_other_head_dims(head_dim, dtype, bound):
    spec = replace(SPEC, block_query=128, block_key=64, importance=Importance(query_stride=16, key_stride=16))
    assert attention_error(*inputs(70, 290, head_dim=head_dim, dtype=dtype), spec, scale=0.1) < bound


@pytest.mark.parametrize(("queries", "keys"), [(2, 300), (64, 192), (65, 192), (300, 300), (127, 320)], ids=str)
def test_where_the_queries_begin(queries, keys):
    assert attention_error(*inputs(queries, keys), SPEC, text_after=1) < 2e-5


def test_negative_scales():
    assert attention_error(*inputs(150), SPEC, scale=-0.3) < 2e-5


def test_long_text_before():
    assert attention_error(*inputs(100, 290), SPEC, text_before=150) < 2e-5


@pytest.mark.parametrize(("queries", "keys", "after"), [(75, 75, 75), (20, 200, 30), (1, 90, 1)], ids=str)
def test_without_video_queries(queries, keys, after):
    q, k, v = inputs(queries, keys, (4, 2), batch=2)
    out = psa_attention(q, k, v, SPEC, causal=True, text_after=after, implementation="triton")
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize(("queries", "keys"), [(1300, 1300), (900, 1333)], ids=str)
def test_importance(statistic, queries, keys):
    """Of more rows than an item has, and more keys than a tile."""
    spec = replace(SPEC, importance=Importance("pooled", statistic, 32, 8))
    q, k, _ = inputs(queries, keys, (2, 1), head_dim=8)
    q = 3 * q
    call = make_call(q, k, k, spec, 2, 1, causal=True, scale=-0.4)
    found = triton_importance.block_importance(q, k, call.causal, call.layout, spec, call.scale)
    video = slice(2, 2 + call.causal.video_keys)
    means = _key_representatives(k[:, video], spec)
    for index, row in enumerate(call.causal.rows):
        candidates = call.causal.candidates(row)
        if candidates:
            expected = _importance(q[:, call.causal.queries(row)], means, call.causal, spec, call.scale, row)
            torch.testing.assert_close(found[:, :, index, :candidates], expected[:, :, 0], rtol=2e-3, atol=1e-7)
        assert found[:, :, index, candidates:].isnan().all()


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_scores_far_above_those_of_the_first_tile(statistic):
    """They are weighed anew, relative to the largest; and rows that do not see them are not."""
    spec = replace(SPEC, importance=Importance("sampled", statistic, 32, 8))
    q, k, _ = inputs(1000, head_dim=8)
    call = make_call(q, k, k, spec, causal=True)
    before = triton_importance.block_importance(q, k, call.causal, call.layout, spec, call.scale)
    k[:, 640:] *= 40
    found = triton_importance.block_importance(q, k, call.causal, call.layout, spec, call.scale)
    means = _key_representatives(k, spec)
    for index, row in enumerate(call.causal.rows[1:], start=1):
        candidates = call.causal.candidates(row)
        expected = _importance(q[:, call.causal.queries(row)], means, call.causal, spec, call.scale, row)
        torch.testing.assert_close(found[:, :, index, :candidates], expected[:, :, 0], rtol=2e-3, atol=1e-7)
        assert torch.equal(found[:, :, index, :candidates], before[:, :, index, :candidates]) is (row <= 10)


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.7, 1.0])
def test_ranks_below(share):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out_ptr, SHARE: tl.constexpr):
        tl.store(out_ptr + tl.program_id(0), triton_boundaries.ranks_below(SHARE, tl.program_id(0)))

    out = torch.zeros(200, dtype=torch.int32)
    kernel[(200,)](out, SHARE=share)
    assert out.tolist() == [ranks_below(share, blocks) for blocks in range(200)]


@pytest.mark.parametrize("rule", ["count", "mass"])
def test_equal_importance_keeps_the_order_of_blocks(rule):
    spec = replace(SPEC, rule=rule, keep_first=1, keep_last=1, thresholds=(0.2, 0.5, 0.7))
    q, k, _ = inputs(400, head_dim=8)
    k[:] = k[:, :1]
    lists = select_blocks(q, k, spec, causal=True, implementation="triton")
    assert torch.equal(lists.levels(), select_blocks(q, k, spec, causal=True, implementation="reference").levels())


@pytest.mark.parametrize("name", ["psa-3", "mass", "budget, kept"])
@pytest.mark.parametrize("changed", [70, 150])
def test_later_keys_and_values_change_no_earlier_output(name, changed):
    """To the bit, also inside the query block of the token."""
    q, k, v = inputs(200)
    call = {"causal": True, "implementation": "triton", "text_before": 3, "text_after": 9}
    out = psa_attention(q, k, v, SPECS[name], **call)
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:, changed:] = 30 * torch.randn_like(x[:, changed:])
    found = psa_attention(q, k, v, SPECS[name], **call)
    assert torch.equal(found[:, :changed], out[:, :changed]) and not torch.equal(found[:, changed], out[:, changed])


@pytest.mark.parametrize("name", ["psa-3", "budget"])
def test_earlier_query_blocks_see_nothing_of_a_later_token(name):
    q, k, v = inputs(200)
    call = {"causal": True, "implementation": "triton"}
    out, lists = psa_attention(q, k, v, SPECS[name], return_lists=True, **call)
    for x in (q, k, v):
        x[:, 150:] = 2 * torch.randn_like(x[:, 150:])
    assert torch.equal(psa_attention(q, k, v, SPECS[name], **call)[:, :128], out[:, :128])
    assert torch.equal(psa_attention(q, k, v, SPECS[name], lists=lists, **call)[:, :150], out[:, :150])
    for x in (q, k, v):
        x[:, 128:] = torch.nan
    assert torch.equal(psa_attention(q, k, v, SPECS[name], **call)[:, :128], out[:, :128])


@pytest.mark.parametrize("name", ["psa-3", "budget, kept"])
def test_a_call_of_the_last_queries_is_the_end_of_the_whole_call(name):
    q, k, v = inputs(260)
    call = {"causal": True, "implementation": "triton", "text_before": 4}
    whole = psa_attention(q, k, v, SPECS[name], **call)
    # Rows begin at token 4, so that this call has its rows whole.
    part = psa_attention(q[:, 4 + 128 :], k, v, SPECS[name], **call)
    torch.testing.assert_close(part, whole[:, 4 + 128 :], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["mass, similarity", "budget, kept"])
def test_lists_of_some_heads_at_a_time_are_the_same(name, monkeypatch):
    q, k, v = inputs(150, heads=(4, 2), batch=2)
    call = make_call(q, k, v, SPECS[name], causal=True)
    whole = triton_select.select(call, call.causal, None)
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(triton_select, "PAIRS_SHARE", 0)
    heads, measured = [], triton_select.block_importance
    monkeypatch.setattr(triton_select, "block_importance", lambda q, *a: heads.append(q.shape[2]) or measured(q, *a))
    parts = triton_select.select(call, call.causal, None)
    assert heads == [2, 2] and torch.equal(parts.ids, whole.ids) and torch.equal(parts.counts, whole.counts)
    assert parts.pooling == whole.pooling == SPECS[name].levels


def test_only_some_items():
    from psa_kernels.causal import triton_attention
    from psa_kernels.pyramid.triton import build_pyramid

    spec = replace(SPEC, block_query=128)
    q, k, v = inputs(300, heads=(4, 2))
    call = make_call(q, k, v, spec, causal=True)
    lists = triton_select.select(call, call.causal, None)
    pyramid = build_pyramid(k, v, call.layout, spec)
    whole, some = torch.empty_like(q), torch.zeros_like(q)
    triton_attention.sparse_attention(q, pyramid, lists, call.causal, spec, call.scale, whole)
    # Items: of keys' head 1 tile 0 of both heads that share it, tile 1, tile 2; then of keys' head 0 tile 2, 1, 0.
    only = torch.zeros(12, dtype=torch.int32)
    only[[0, 3, 10]] = 1
    some[:, ::2, :, 0] = torch.nan
    triton_attention.sparse_attention(q, pyramid, lists, call.causal, spec, call.scale, some, only)
    wanted = torch.zeros(300, 4, dtype=torch.bool)
    wanted[:128, 3] = wanted[128:256, 2] = wanted[:128, 1] = True
    wanted[1::2] = False
    assert torch.equal(some[0][wanted], whole[0][wanted])
    wanted[1::2] = True
    assert some[0, ::2, :, 0][~wanted[::2]].isnan().all() and (some[0, 1::2] == 0).all()
