"""The Triton kernels where several heads of the queries share one of the keys and values, in Triton's interpreter.

Memory that is not initialized holds what is no number, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import budget_checks
import pytest
import torch

from psa_kernels import AttentionSpec, Importance, head_groups, psa_attention, select_blocks
from psa_kernels.allocation import reference as reference_allocation
from psa_kernels.allocation import triton as triton_allocation
from psa_kernels.importance import reference as reference_importance
from psa_kernels.importance import triton as triton_importance
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import triton as triton_pyramid
from psa_kernels.quantise import reference as reference_quantise
from psa_kernels.quantise import triton as triton_quantise
from psa_kernels.quantise import triton_channels
from psa_kernels.sparse import triton as triton_sparse

# Whatever a kernel leaves unwritten shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SPEC = AttentionSpec(block_query=64, block_key=16, thresholds=(0.2, 0.4, 0.8), importance=Importance(key_stride=8))


def inputs(queries, keys=None, heads=(4, 2), *, batch=1, head_dim=16, dtype=torch.float32):
    """Random q `[B, Nq, heads[0], D]` and k, v `[B, Nk, heads[1], D]`, views into wider tensors."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, h, head_dim + 3) for n, h in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))]
    return [(1.5 * torch.randn(shape)).to(dtype)[..., :head_dim] for shape in shapes]


def attention_error(q, k, v, spec, **options):
    """Largest difference from the reference with the same lists."""
    call = {"implementation": "triton", **options}
    out, stats, lists = psa_attention(q, k, v, spec, return_stats=True, return_lists=True, **call)
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    assert stats.implementation == "triton" and out.is_contiguous() and out.shape == q.shape and out.dtype == q.dtype
    assert stats.density.shape == (q.shape[0], q.shape[2])
    return (out.double() - expected).abs().max().item()


@pytest.mark.parametrize("heads", [(3, 1), (4, 2)], ids=str)
def test_whole_calls(heads):
    batch = 2 if heads == (4, 2) else 1
    assert attention_error(*inputs(75, heads=heads, batch=batch), SPEC) < 2e-5


def test_text_and_another_order():
    options = {"text_before": 3, "text_after": 4, "permutation": torch.randperm(75)}
    assert attention_error(*inputs(82), SPEC, **options) < 2e-5


@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (90, 33)], ids=str)
def test_query_length_unlike_key_length(queries, keys):
    """After a call of heads in pairs of the same shape, whose launches are kept."""
    q, k, v = inputs(queries, keys)
    pairs = (x.repeat_interleave(2, 2) for x in (k, v))
    psa_attention(q, *pairs, SPEC, implementation="triton")
    assert attention_error(q, k, v, SPEC) < 2e-5


def test_float16_and_padded_head_dims():
    assert attention_error(*inputs(75, head_dim=40, dtype=torch.float16), SPEC, scale=0.2) < 4e-3


@pytest.mark.parametrize("fields", [{"rest": "mean"}, {"rule": "mass", "similarity": (0.01, 0.0)}], ids=str)
def test_other_rules(fields):
    spec = replace(SPEC, importance=Importance("pooled", "mean", 8, 8), **fields)
    assert attention_error(*inputs(80), spec) < 2e-5


@pytest.mark.parametrize("statistic", ["max", "mean"])
def test_importance(statistic):
    spec = replace(SPEC, importance=Importance("sampled", statistic, 4, 8))
    layout = make_layout(70, 150, 2, 3, None)
    q, k, _ = inputs(70, 150, (6, 2), batch=2)
    expected = reference_importance.block_importance(q, k, layout, spec, -0.3)
    found = triton_importance.block_importance(q, k, layout, spec, -0.3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_coarsest_levels_are_those_of_the_head_of_the_keys():
    importance = torch.rand(2, 6, 2, 20)
    coarsest = torch.randint(0, 3, (2, 2, 20))
    expected = reference_allocation.allocate(importance, coarsest, SPEC)
    found = triton_allocation.allocate(importance, coarsest.int(), SPEC)
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(("levels", "rest"), [((1, 2, 4), "skip"), ((2, 8), "mean")], ids=str)
def test_prices(levels, rest):
    spec = replace(SPEC, rule="budget", density=0.3, levels=levels, rest=rest)
    layout = make_layout(105, 75, 2, 3, None)
    off = budget_checks.price_steps_off(*inputs(105, 75, heads=(4, 2), batch=2), layout, spec, 0.3)
    assert off.max() <= 2 and (off > 1).float().mean() <= 0.03


def test_a_whole_call_with_a_budget():
    spec = replace(SPEC, rule="budget", density=0.3)
    assert attention_error(*inputs(60, heads=(2, 1)), spec, text_after=3) < 2e-5


def test_groups_of_heads_change_nothing(monkeypatch):
    q, k, v = inputs(50, heads=(4, 2))
    spec = replace(SPEC, rule="mass", thresholds=(0.3, 0.6, 0.9), similarity=(0.01, 0.0))
    call = {"text_before": 2, "permutation": torch.randperm(48), "implementation": "triton"}
    whole, lists = psa_attention(q, k, v, spec, return_lists=True, **call)
    assert torch.equal(select_blocks(q, k, spec, **call).ids, lists.ids)
    launches, pool_tokens = [], triton_pyramid.pool_tokens
    monkeypatch.setattr(triton_pyramid, "pool_tokens", lambda x, *a: launches.append(x.shape[2]) or pool_tokens(x, *a))
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(head_groups, "LARGEST_SHARE", 0)
    parts, found = psa_attention(q, k, v, spec, return_lists=True, **call)
    assert torch.equal(parts, whole) and torch.equal(found.ids, lists.ids)
    assert launches == [1] * 4


def test_log_sum_exp():
    q, k, v = inputs(75, heads=(6, 2), batch=2)
    layout = make_layout(75, 75, 0, 0, None)
    spec = replace(SPEC, levels=(1,), thresholds=(1.0,))
    lists = select_blocks(q, k, spec, implementation="triton")
    lse = torch.full((2, 6, 75), torch.nan)
    triton_sparse.sparse_attention(q, triton_pyramid.build_pyramid(k, v, layout, spec), lists, layout, spec, 0.25, lse)
    expected = (0.25 * q.transpose(1, 2) @ k.repeat_interleave(3, 2).permute(0, 2, 3, 1)).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def test_matrices_of_channels_serve_all_heads_that_share_keys():
    q, k, _ = inputs(70, 90, (6, 2), batch=2)
    q = q * 2.0 ** torch.randint(-5, 6, (6, 16))
    q[0, 0, 4, 5] = math.nan
    of_queries, of_keys = triton_channels.channel_matrices(q, k)
    assert of_queries.shape == of_keys.shape == (2, 2, 16, 16)
    for b in range(2):
        for h in range(2):
            scales = reference_quantise.channel_scales(q[b, :, 3 * h : 3 * h + 3], k[b, :, h])
            expected = reference_quantise.channel_matrices(scales)
            assert torch.equal(of_queries[b, h], expected[0]) and torch.equal(of_keys[b, h], expected[1] * 16)
            assert len(scales.unique()) > 2


def test_integers_of_queries_are_made_by_the_matrix_of_their_keys():
    q, k, v = inputs(70, 90, (6, 2), batch=2)
    layout = make_layout(70, 90, 2, 3, None)
    pyramid = triton_pyramid.build_pyramid(k, v, layout, SPEC, gathered=True)
    found = triton_quantise.quantise_rows(q, pyramid, layout, SPEC, 0.3)
    assert found.queries.shape == q.shape and found.factors.shape == (2, 6, 70) and found.key_means.shape == (2, 2, 16)
    assert [rows.shape[1] for rows in found.keys] == [2] * 5
    wide = [x.repeat_interleave(3, 2) for x in (k, v)]
    products = torch.einsum("bqhd,bhkd->bhqk", found.queries.float(), found.keys[2].float().repeat_interleave(3, 1))
    logits = products * found.factors[..., None] * math.log(2)
    exact = 0.3 * torch.einsum("bqhd,bkhd->bhqk", q, wide[0][:, 2:87])
    exact -= 0.3 * torch.einsum("bqhd,bhd->bhq", q, found.key_means.repeat_interleave(3, 1))[..., None]
    assert (logits - exact).norm() < 0.02 * exact.norm()
