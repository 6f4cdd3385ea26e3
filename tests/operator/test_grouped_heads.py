"""Several heads of the queries that share one of the keys and values, as in grouped-query attention: the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.allocation import prices
from psa_kernels.backends import reference as backend
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import reference as pyramid
from psa_testing.brute_force import brute_force

SPEC = AttentionSpec(block_query=16, block_key=8, importance=Importance(query_stride=4, key_stride=4))
SPECS = {
    "psa-3": SPEC,
    "mass, similarity": replace(SPEC, rule="mass", thresholds=(0.4, 0.6, 0.9), similarity=(0.05, 0.0)),
    "pooled, rest": replace(SPEC, rest="mean", importance=Importance("pooled", "mean", 8, 2)),
    "budget": replace(SPEC, rule="budget", density=0.3),
    "integers": replace(SPEC, precision="int8_qk"),
}


def inputs(queries, keys=None, heads=(6, 2), *, batch=2, head_dim=8, dtype=torch.float64):
    """Random q `[B, Nq, heads[0], D]` and k, v `[B, Nk, heads[1], D]`, views into wider tensors."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, h, head_dim + 3) for n, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))]
    return [(1.5 * torch.randn(shape, dtype=torch.float64)).to(dtype)[..., :head_dim] for shape in shapes]


def repeated(x, heads):
    """The keys or values that each of so many heads of the queries reads."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


@pytest.mark.parametrize("name", ["psa-3", "mass, similarity", "pooled, rest"])
@pytest.mark.parametrize(("queries", "keys"), [(61, 61), (33, 71), (5, 96), (40, 1)], ids=str)
def test_the_maths_written_down(name, queries, keys):
    q, k, v = inputs(queries + 5, keys + 5, batch=1)
    permutation = torch.randperm(queries) if queries == keys else None
    options = {"text_before": 2, "text_after": 3, "permutation": permutation, "scale": 0.5}
    out, stats = psa_attention(q, k, v, SPECS[name], return_stats=True, **options)
    expected, density = brute_force(q, k, v, SPECS[name], **options)
    assert out.shape == q.shape and out.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.density.double(), density, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (6, 3)], ids=str)
@pytest.mark.parametrize("name", ["psa-3", "mass, similarity", "pooled, rest", "budget"])
def test_repeated_keys_give_the_same(name, heads):
    """Lists and statistics have an entry for every head of the queries."""
    q, k, v = inputs(70, heads=heads)
    options = {"text_before": 4, "text_after": 3, "permutation": torch.randperm(63)}
    asked = {"return_stats": True, "return_lists": True, **options}
    out, stats, lists = psa_attention(q, k, v, SPECS[name], **asked)
    wide = q, *(repeated(x, heads[0]) for x in (k, v))
    expected, wide_stats, wide_lists = psa_attention(*wide, SPECS[name], **asked)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(lists.ids, wide_lists.ids) and torch.equal(lists.counts, wide_lists.counts)
    assert stats.density.shape == (2, heads[0]) and torch.equal(stats.density, wide_stats.density)
    assert lists.ids.shape[1] == heads[0] and not torch.equal(lists.levels()[:, 0], lists.levels()[:, 1])
    assert torch.equal(select_blocks(q, k, SPECS[name], v=v, **options).ids, lists.ids)
    assert torch.equal(psa_attention(q, k, v, SPECS[name], lists=lists, **options), out)


def test_heads_read_their_own_keys_and_no_others():
    q, k, v = inputs(61)
    out = psa_attention(q, k, v, SPEC, text_after=5)
    for x in (k, v):
        x[:, :, 1] = torch.nan
    poisoned = psa_attention(q, k, v, SPEC, text_after=5)
    assert torch.equal(poisoned[:, :, :3], out[:, :, :3]) and poisoned[:, :, 3:].isnan().all()


@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=str)
def test_calls_without_video_and_text_queries_are_dense(heads, monkeypatch):
    """What PyTorch is given has as many heads as the keys have."""
    q, k, v = inputs(30, 9, heads)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.4, enable_gqa=True)
    exact = exact.transpose(1, 2)
    given, dense = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **o: given.append(x) or dense(*x, **o))
    out = psa_attention(q, k, v, SPEC, text_after=9, scale=0.4)
    torch.testing.assert_close(out, exact)
    assert out.is_contiguous()
    out = psa_attention(q, k, v, SPEC, text_before=2, text_after=5, scale=0.4)
    torch.testing.assert_close(out[:, :2], exact[:, :2])
    torch.testing.assert_close(out[:, 25:], exact[:, 25:])
    assert [x.shape[1] for call in given for x in call] == [heads[1]] * 6


def test_everything_kept_is_dense_attention():
    q, k, v = inputs(130, heads=(8, 2), dtype=torch.float32)
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    for spec in (replace(SPEC, levels=(1,), thresholds=(1.0,)), replace(SPECS["budget"], density=1.0)):
        torch.testing.assert_close(psa_attention(q, k, v, spec), exact, rtol=1e-4, atol=1e-5)


def test_nothing_is_repeated_in_memory(monkeypatch):
    """Pyramids are made of the caller's keys and values, head by head."""
    q, k, v = inputs(61, heads=(6, 2), batch=1)
    made, build = [], pyramid.build_pyramid
    monkeypatch.setattr(
        "psa_kernels.sparse.reference.build_pyramid", lambda x, *a, **o: made.append(x) or build(x, *a, **o)
    )
    psa_attention(q, k, v, SPEC)
    storages = {x.untyped_storage().data_ptr() for x in made}
    assert storages == {x.untyped_storage().data_ptr() for x in (k, v)}


def test_prices_of_several_heads_at_a_time(monkeypatch):
    """As on a GPU, where all heads that share keys are one task, or those of several keys are."""
    q, k, v = inputs(100, heads=(6, 3))
    spec, layout = SPECS["budget"], make_layout(100, 100, 0, 0, None)
    importance = block_importance(q, k, layout, spec, 0.3)
    wide = (repeated(x, 6) for x in (k, v))
    expected = prices.upgrade_prices(q, *wide, importance, layout, spec, 0.3)
    assert torch.equal(prices.upgrade_prices(q, k, v, importance, layout, spec, 0.3), expected)
    heads_at_once = prices.heads_at_once
    for tokens in (1, 400, 10_000):
        monkeypatch.setattr(prices, "TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr(prices, "heads_at_once", lambda _, *rest: heads_at_once(True, *rest))
        found = prices.upgrade_prices(q, k, v, importance, layout, spec, 0.3)
        assert (found.int() - expected).abs().max() <= 1


def one_key_head_at_a_time(monkeypatch):
    """Let the reference have groups of heads, as backends with pyramids do."""
    monkeypatch.setattr(backend.Reference, "has_pyramid", True)
    monkeypatch.setattr(backend.Reference, "pyramid_rows", lambda *_: 100)
    monkeypatch.setattr(backend.Reference, "pool_keys", lambda *_: None)
    monkeypatch.setattr("psa_kernels.head_groups.SMALL_PYRAMIDS", 1)
    monkeypatch.setattr("psa_kernels.head_groups.LARGEST_SHARE", 0)


def test_groups_of_heads_hold_all_that_share_keys(monkeypatch):
    q, k, v = inputs(70, heads=(6, 3))
    whole, lists = psa_attention(q, k, v, SPEC, text_after=4, return_lists=True)
    calls, attend = [], backend.Reference.attend

    def recorded(self, call, *rest):
        calls.append((call.q.shape[2], call.k.shape[2], call.v.shape[2]))
        attend(self, call, *rest)

    one_key_head_at_a_time(monkeypatch)
    monkeypatch.setattr(backend.Reference, "attend", recorded)
    for given in (None, lists):
        parts, stats, found = psa_attention(
            q, k, v, SPEC, text_after=4, lists=given, return_stats=True, return_lists=True
        )
        assert torch.equal(parts, whole) and torch.equal(found.ids, lists.ids) and stats.density.shape == (2, 6)
    assert calls == [(2, 1, 1)] * 6


def test_groups_of_heads_are_named_when_they_are_done(monkeypatch):
    """Their rows of video queries are then as they stay, and no other group is begun."""
    q, k, v = inputs(70, heads=(6, 3))
    whole = psa_attention(q, k, v, SPEC, text_after=4)
    done = []

    def note(heads):
        done.append((heads, out[:, :66].clone()))

    for groups in ([slice(0, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)]):
        if len(groups) == 3:
            one_key_head_at_a_time(monkeypatch)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        psa_attention(q, k, v, SPEC, text_after=4, out=out, heads_done=note)
        assert [heads for heads, _ in done] == groups and torch.equal(out, whole)
        for heads, found in done:
            assert torch.equal(found[:, :, : heads.stop], whole[:, :66, : heads.stop])
            assert found[:, :, heads.stop :].isnan().all()
        done.clear()


def test_dense_work_counts_the_heads_of_the_queries():
    from psa_kernels.call import make_call

    q, k, v = inputs(20, 30, (6, 2))
    assert make_call(q, k, v, SPEC).dense_work == 4 * 2 * 6 * 20 * 30 * 8
