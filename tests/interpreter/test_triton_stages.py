"""The Triton kernels, stage by stage, against the reference, in Triton's interpreter.

bfloat16 is left out, of which the interpreter computes garbage.
"""

from __future__ import annotations

import not_finite
import pytest
import torch

from psa_kernels import AttentionSpec, Importance, head_groups, psa_attention, select_blocks
from psa_kernels.allocation import reference as reference_allocation
from psa_kernels.allocation import triton as triton_allocation
from psa_kernels.importance import reference as reference_importance
from psa_kernels.importance import representatives
from psa_kernels.importance import triton as triton_importance
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import reference as reference_pyramid
from psa_kernels.pyramid import triton as triton_pyramid
from psa_kernels.sparse import triton as triton_sparse

HEAD_DIM = 16


def inputs(queries, keys=None, *, batch=1, heads=1, head_dim=HEAD_DIM, dtype=torch.float32):
    """Fresh random q, k, v `[B, N, H, D]`, views into one wider tensor each."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, heads, head_dim + 3) for n in (queries, keys, keys)]
    return [(1.5 * torch.randn(shape)).to(dtype)[..., :head_dim] for shape in shapes]


@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
@pytest.mark.parametrize(
    ("block_key", "levels", "rest"), [(16, (1, 2, 4), "skip"), (16, (2, 8), "mean"), (32, (1, 16), "mean")], ids=str
)
@pytest.mark.parametrize("tokens", [85, 1], ids=lambda n: f"n{n}")
def test_pyramid_rows_are_the_means_of_the_reference(tokens, block_key, levels, rest, permuted):
    permutation = torch.randperm(tokens) if permuted else None
    layout = make_layout(tokens + 5, tokens + 5, 2, 3, permutation)
    spec = AttentionSpec(block_key=block_key, levels=levels, thresholds=(1.0,) * len(levels), rest=rest)
    _, k, v = inputs(tokens + 5, batch=2)
    built = triton_pyramid.build_pyramid(k, v, layout, spec)
    rows = reference_pyramid.pyramid_rows(layout, spec, like=k)
    pooled = slice(rows.first_row[1] if levels[0] == 1 else 0, rows.first_row[-1])
    for tokens_of, found in ((k, built.keys), (v, built.values)):
        for b in range(2):
            expected = torch.empty(len(rows.log_count), HEAD_DIM)
            reference_pyramid.build_pyramid(tokens_of[b, :, 0], rows, out=expected)
            torch.testing.assert_close(found[b, 0], expected[pooled], rtol=1e-5, atol=1e-6)
    assert built.coarsest is None


@pytest.mark.parametrize("tokens", [128, 65], ids=lambda n: f"n{n}")
@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
def test_similarity_cap(tokens, permuted):
    permutation = torch.randperm(tokens) if permuted else None
    layout = make_layout(tokens + 4, tokens + 4, 4, 0, permutation)
    spec = AttentionSpec(block_key=32, levels=(1, 2, 32), similarity=(0.02, 0.3))
    _, k, v = inputs(tokens + 4, heads=3)
    k[:, :, 0] = 1  # so that its blocks may be as coarse as any, whatever the others are
    expected = reference_pyramid.coarsest_levels(k, layout, spec)
    assert expected.unique().numel() > 1
    torch.testing.assert_close(triton_pyramid.coarsest_levels(k, layout, spec).long(), expected)
    torch.testing.assert_close(triton_pyramid.build_pyramid(k, v, layout, spec, True).coarsest.long(), expected)


@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize(
    "how", [("sampled", 4, 4), ("pooled", 4, 4), ("pooled", 16, 8), ("pooled", 8, 1), ("sampled", 1, 16)], ids=str
)
@pytest.mark.parametrize(("queries", "keys"), [(150, 150), (65, 334)], ids=str)
def test_importance(how, statistic, queries, keys):
    estimator, query_stride, key_stride = how
    spec = AttentionSpec(
        block_query=64, block_key=16, importance=Importance(estimator, statistic, query_stride, key_stride)
    )
    permutation = torch.randperm(queries) if queries == keys else None
    layout = make_layout(queries + 5, keys + 5, 2, 3, permutation)
    q, k, _ = inputs(queries + 5, keys + 5)
    expected = reference_importance.block_importance(q, k, layout, spec, -0.3)
    found = triton_importance.block_importance(q, k, layout, spec, -0.3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize(("block_key", "key_stride"), [(64, 64), (64, 32), (64, 8), (128, 4), (128, 1)], ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_importance_in_other_tiles(monkeypatch, capability, block_key, key_stride, statistic):
    monkeypatch.setattr(triton_importance, "capability", lambda _: capability)
    how = Importance("sampled", statistic, 8, key_stride)
    spec = AttentionSpec(block_key=block_key, importance=how)
    layout = make_layout(1100, 300, 0, 0, None)
    # Of such large scores those of later tiles exceed the first by more than the scratch can hold.
    for gain in (1, 100):
        q, k, _ = inputs(1100, 300)
        expected = reference_importance.block_importance(gain * q, k, layout, spec, 0.3)
        found = triton_importance.block_importance(gain * q, k, layout, spec, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


ALLOCATIONS = {
    "count": {"thresholds": (0.15, 0.25, 0.45)},
    "count to the end": {"thresholds": (0.0, 0.3, 1.0)},
    "count, floor": {"thresholds": (0.0, 0.1, 0.3), "floor": 0.2},
    "mass": {"rule": "mass", "thresholds": (0.4, 0.6, 0.9)},
    "mass, floor": {"rule": "mass", "thresholds": (0.0, 0.2, 0.7), "floor": 0.15},
    "mass to the end": {"rule": "mass", "thresholds": (0.25, 0.5, 1.0)},
    "six levels": {"levels": (1, 2, 4, 8, 16, 32), "thresholds": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("key_blocks", [1, 20, 130])
def test_lists_are_those_of_the_reference_bit_for_bit(name, key_blocks):
    spec = AttentionSpec(**ALLOCATIONS[name])
    smooth = torch.rand(1, 1, 2, key_blocks) ** 8
    tied = (smooth * 8).round() + 0.5
    # Eighths add up exactly, so that shares of them meet thresholds exactly.
    uniform = torch.full((1, 1, 1, key_blocks), 0.125)
    together = torch.cat([smooth[:, :, :1], tied[:, :, :1], uniform], dim=2)
    padded = torch.full((1, 1, 3, key_blocks + 16), 7.0)[..., :key_blocks].copy_(together)
    cap = torch.randint(0, len(spec.levels), (1, 1, key_blocks))
    for importance, coarsest in ((smooth, cap), (padded, None)):
        expected = reference_allocation.allocate(importance, coarsest, spec)
        found = triton_allocation.allocate(importance, None if coarsest is None else coarsest.int(), spec)
        assert found.ids.dtype == expected.ids.dtype and found.counts.dtype == expected.counts.dtype
        assert torch.equal(found.counts, expected.counts)
        assert torch.equal(found.ids, expected.ids) and found.pooling == expected.pooling == spec.levels


def test_mass_that_float32_cannot_tell_from_the_threshold():
    """Before the second block lies 1 of 2 + 2^-30: less than half, but in float32 just half."""
    importance = torch.tensor([0.25, 1.0, 0.125, 2.0**-30, 0.5, 0.125])[None, None, None]
    spec = AttentionSpec(rule="mass", levels=(1, 2), thresholds=(0.5, 1.0))
    for allocate in (reference_allocation.allocate, triton_allocation.allocate):
        lists = allocate(importance, None, spec)
        assert lists.ids.tolist() == [[[[1, 4, 0, 2, 3, 5]]]] and lists.counts.tolist() == [[[[2, 4]]]]


def attention_error(q, k, v, spec, **options):
    """Largest difference from the reference with the same lists; both halves of the operator at once must agree."""
    call = {"implementation": "triton", **options}
    out, stats, lists = psa_attention(q, k, v, spec, return_stats=True, return_lists=True, **call)
    wide = (x.double() for x in (q, k, v))
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    assert stats.implementation == "triton" and out.is_contiguous() and out.dtype == q.dtype
    assert torch.equal(out, psa_attention(q, k, v, spec, lists=lists, **call))
    return (out.double() - expected).abs().max().item()


def test_lists_inside_attention_are_those_of_select_blocks(monkeypatch):
    """Also where a level's factor divides the stride: its means, rounded as they are stored, are not pooled further."""
    q, k, v = inputs(300, dtype=torch.float16)
    spec = AttentionSpec(block_query=64, block_key=16, importance=Importance("pooled", "mean", 8, 8))
    allocate, made = triton_allocation.allocate, []

    def recorded(importance, *arguments):
        lists = allocate(importance, *arguments)
        made.append((importance, lists.ids, lists.counts))
        return lists

    monkeypatch.setattr(triton_allocation, "allocate", recorded)
    select_blocks(q, k, spec, implementation="triton")
    psa_attention(q, k, v, spec, implementation="triton")
    assert len(made) == 2 and all(map(torch.equal, *made))


ATTENTIONS = {
    "psa-3": {},
    "one level": {"levels": (1,), "thresholds": (0.5,)},
    "everything": {"levels": (1,), "thresholds": (1.0,)},
    "no exact level": {"levels": (2, 8), "thresholds": (0.3, 0.8)},
    "blocks of one row": {"levels": (1, 4, 16), "thresholds": (0.1, 0.3, 0.9), "block_key": 16},
    "blocks wider than a tile": {"levels": (1, 2, 256), "thresholds": (0.4, 0.7, 1.0), "block_key": 256},
    "rest mean": {"rest": "mean", "thresholds": (0.1, 0.2, 0.3)},
    "similarity": {"similarity": (0.01, 0.0), "rule": "mass", "thresholds": (0.3, 0.6, 0.9)},
    "short query blocks": {"block_query": 64, "block_key": 32},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    spec = AttentionSpec(**{"block_key": 32, **ATTENTIONS[name]})
    tokens = (139, 683) if spec.block_key == 256 else (139,)
    assert attention_error(*inputs(*tokens), spec) < 2e-5


@pytest.mark.parametrize("name", ["psa-3", "no exact level"])
def test_sums_that_are_finished_late(name, monkeypatch):
    """As on GPUs of compute capability 9.0."""
    monkeypatch.setattr(triton_sparse, "LATE_SUM", (8,))
    assert attention_error(*inputs(139), AttentionSpec(**{"block_key": 32, **ATTENTIONS[name]})) < 2e-5


@pytest.mark.parametrize("name", ["psa-3", "rest mean"])
def test_attention_in_another_order(name):
    spec = AttentionSpec(**{"block_key": 32, **ATTENTIONS[name]})
    assert attention_error(*inputs(139, heads=2), spec, permutation=torch.randperm(139)) < 2e-5


@pytest.mark.parametrize(("before", "after"), [(3, 0), (70, 9)])
def test_text(before, after):
    spec = AttentionSpec(block_query=64, block_key=16, rest="mean")
    options = {"text_before": before, "text_after": after}
    assert attention_error(*inputs(75 + before + after), spec, permutation=torch.randperm(75), **options) < 2e-5
    assert attention_error(*inputs(65 + before + after, 55 + before + after), spec, **options) < 2e-5


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 90), (90, 1)], ids=str)
def test_query_length_unlike_key_length(queries, keys):
    assert attention_error(*inputs(queries, keys, batch=2), AttentionSpec(block_query=64, block_key=16)) < 2e-5


@pytest.mark.parametrize("head_dim", [40, 96])
def test_head_dims_that_are_padded(head_dim):
    assert attention_error(*inputs(75, head_dim=head_dim), AttentionSpec(block_query=64, block_key=16)) < 2e-5


def test_float16():
    assert attention_error(*inputs(139, dtype=torch.float16), AttentionSpec(block_key=32), scale=0.2) < 4e-3


def test_negative_scale_and_none():
    for scale in (-0.4, 0.0):
        assert attention_error(*inputs(75), AttentionSpec(block_query=64, block_key=16), scale=scale) < 2e-5


def test_log_sum_exp():
    q, k, v = inputs(75)
    permutation = torch.randperm(72)
    layout = make_layout(75, 75, 1, 2, permutation)
    spec = AttentionSpec(block_query=64, block_key=16, levels=(1,), thresholds=(1.0,))
    lists = select_blocks(q, k, spec, text_before=1, text_after=2, permutation=permutation, implementation="triton")
    lse = torch.full((1, 1, 75), torch.nan)
    pyramid = triton_pyramid.build_pyramid(k, v, layout, spec)
    triton_sparse.sparse_attention(q, pyramid, lists, layout, spec, 0.25, lse)
    expected = (0.25 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).logsumexp(-1)
    torch.testing.assert_close(lse[:, :, 1:73], expected[:, :, 1:73], rtol=1e-5, atol=1e-5)
    assert lse[:, :, 0].isnan().all() and lse[:, :, 73:].isnan().all()


@pytest.mark.parametrize("similarity", [None, (0.01, 0.0)])
def test_keys_and_values_of_one_launch_are_those_of_two(similarity):
    _, k, v = inputs(70, batch=2, heads=2)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)  # strides of its own
    spec = AttentionSpec(block_query=64, block_key=16, levels=(1, 2, 4), similarity=similarity)
    layout = make_layout(70, 70, 2, 0, torch.randperm(68))
    for gathered in (False, True):
        two = triton_pyramid.build_pyramid(k, v, layout, spec, True, gathered)
        one = triton_pyramid.pool_keys(k, layout, spec, True, gathered, v)
        assert triton_pyramid.add_values(one, v, layout) is one
        assert torch.equal(one.keys, two.keys) and torch.equal(one.values, two.values)
        assert one.source_values is v and one.factors == two.factors
        assert (one.coarsest is None) == (similarity is None)
        if similarity is not None:
            assert torch.equal(one.coarsest, two.coarsest)


def test_groups_of_heads_change_nothing(monkeypatch):
    """Each kernel writes into its part of the output, and reads its part of the lists."""
    q, k, v = inputs(70, batch=2, heads=2)
    spec = AttentionSpec(
        block_query=64, block_key=16, levels=(1, 4), thresholds=(0.3, 0.8), importance=Importance("pooled", "max", 8, 8)
    )
    options = {"text_before": 2, "permutation": torch.randperm(68), "implementation": "triton"}
    asked = {"return_stats": True, "return_lists": True, **options}
    whole, stats, lists = psa_attention(q, k, v, spec, **asked)
    launches, pool_tokens = [], triton_pyramid.pool_tokens
    monkeypatch.setattr(triton_pyramid, "pool_tokens", lambda x, *a: launches.append(x.shape[2]) or pool_tokens(x, *a))
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(head_groups, "LARGEST_SHARE", 0)
    for kept in (None, lists):
        parts, part_stats, part_lists = psa_attention(q, k, v, spec, lists=kept, **asked)
        assert torch.equal(parts, whole) and parts.is_contiguous()
        assert torch.equal(part_lists.ids, lists.ids) and torch.equal(part_lists.counts, lists.counts)
        for name in ("density", "coverage", "level_shares"):
            assert torch.equal(getattr(part_stats, name), getattr(stats, name))
    assert launches == [1] * 8


def test_wide_offsets_change_nothing(monkeypatch):
    q, k, v = inputs(75)
    spec = AttentionSpec(block_query=64, block_key=16)
    narrow = psa_attention(q, k, v, spec, implementation="triton")
    for module, plan in ((triton_pyramid, "_pooling"), (triton_importance, "tiling_of_both"), (triton_sparse, "_plan")):
        monkeypatch.setattr(module, plan, getattr(module, plan).__wrapped__)
    for module in (triton_pyramid, representatives, triton_sparse):
        monkeypatch.setattr(module, "are_wide", lambda *_: True)
    assert torch.equal(psa_attention(q, k, v, spec, implementation="triton"), narrow)


@pytest.mark.parametrize(
    ("which", "value", "name"), [("q", "nan", "count"), ("k", "nan", "mass, similarity, rest"), ("v", "huge", "count")]
)
def test_values_that_are_not_finite(which, value, name):
    spec = not_finite.make_spec(name)
    not_finite.check_output(which, value, spec, "triton", 1e-4, tokens=80)
    if which == "k":
        not_finite.check_lists(which, value, spec, "triton", tokens=80)
