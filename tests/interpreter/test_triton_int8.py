"""The Triton kernels that quantise, in Triton's interpreter.

Memory that is not initialized holds what is no number, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

import math

import pytest
import torch

from psa_kernels import AttentionSpec, BlockLists
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import reference as reference_pyramid
from psa_kernels.pyramid import triton as pyramid
from psa_kernels.quantise import reference, triton, triton_channels
from psa_kernels.sparse import reference as reference_sparse


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    monkeypatch.setattr(triton, "CHUNK", 64)
    monkeypatch.setattr(triton, "RUN", 128)
    make = torch.empty

    def poisoned(*arguments, **options):
        made = make(*arguments, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def inputs(queries, keys=None, *, batch=2, heads=2, head_dim=16, dtype=torch.float32):
    """Fresh random q, k, v, views into wider tensors, whose keys have a mean far from 0."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, heads, head_dim + 3) for n in (queries, keys, keys)]
    q, k, v = ((1.5 * torch.randn(shape)).to(dtype)[..., :head_dim] for shape in shapes)
    k += 4 * torch.randn(head_dim)
    return q, k, v


def assert_same_integers(found, expected):
    """But for entries that lie in the middle of two integers, to the rounding of float32."""
    difference = (found.double() - expected).abs()
    assert difference.max() <= 1 and (difference > 0).double().mean() < 2e-3


def in_new_channels(rows, matrices):
    """Rows `[B, H, rows, D]` times the matrix of each head, exactly."""
    return rows.double() @ matrices.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [(1000, 700), (1, 257), (70, 1)], ids=str)
def test_matrices(tokens, dtype):
    q, k, _ = inputs(*tokens, dtype=dtype)
    factors = 2.0 ** torch.randint(-7, 8, (2, 2, 1, 2, 16))
    q, k = q * factors[0].to(dtype), k * factors[1].to(dtype)
    k[..., 3] = 2.5
    q[..., 4] = 0
    q[0, 0, 0, 5], q[0, -1, 0, 6], k[1, 0, 0, 5], k[1, -1, 1, 6] = math.nan, math.inf, -math.inf, math.nan
    of_queries, of_keys = triton_channels.channel_matrices(q, k)
    for b in range(2):
        for h in range(2):
            scales = reference.channel_scales(q[b, :, h : h + 1], k[b, :, h])
            expected = reference.channel_matrices(scales)
            assert torch.equal(of_queries[b, h].float(), expected[0])
            assert torch.equal(of_keys[b, h].float(), expected[1] * 16)
            assert scales[3] == scales[4] == 1 and (tokens[1] == 1 or len(scales.unique()) > 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [(70,), (5, 3, 33), (1,)], ids=str)
def test_keys(parts, dtype):
    q, k, _ = inputs(9, sum(parts) + 40, dtype=dtype)
    heads_first = k.transpose(1, 2)
    *finest, others = heads_first.split([*parts, 40], dim=2)
    others = others * 0.3 + heads_first.mean(2, keepdim=True) * 0.7
    of_queries, of_keys = triton_channels.channel_matrices(q, k)
    means, rotated_means, largest = triton.key_means_and_largest(finest, of_queries, of_keys)
    integers = [triton.quantise_keys(rows, of_keys, rotated_means, largest) for rows in (*finest, others)]
    torch.testing.assert_close(means.double(), torch.cat(finest, 2).double().mean(2), rtol=1e-5, atol=1e-5)
    for b in range(2):
        for h in range(2):
            mean, entry = reference.key_mean_and_largest(in_new_channels(torch.cat(finest, 2), of_keys)[b, h])
            torch.testing.assert_close(rotated_means[b, h].double(), mean, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(largest[b, h].double(), entry, rtol=1e-5, atol=0)
            for rows, found in zip((*finest, others), integers, strict=True):
                assert found.dtype == torch.int8
                exact = in_new_channels(rows, of_keys)[b, h] - rotated_means[b, h].double()
                exact[exact.abs() < 1e-5] = 0  # The rounding of float32 is what a lone key has less itself.
                assert_same_integers(found[b, h], reference.to_integers(exact, largest[b, h].double()))
    if parts != (1,):
        assert max(found.abs().max() for found in integers[: len(parts)]) == 127


def test_queries():
    q, k, _ = inputs(150, dtype=torch.float16)
    q[0, 5] = 0
    key_largest = torch.rand(2, 2)
    of_queries, _ = triton_channels.channel_matrices(q, k)
    integers, factors = triton.quantise_queries(q, of_queries, key_largest, 0.25)
    rows = in_new_channels(q.transpose(1, 2), of_queries).transpose(1, 2)
    largest = torch.stack([reference.largest_of_queries(x) for x in rows.flatten(0, 2)[:, None]]).view(2, 150, 2, 1)
    assert integers.shape == q.shape and integers.dtype == torch.int8
    assert_same_integers(integers, reference.to_integers(rows, largest))
    # Both matrices make rows larger: products are 16 times what they stand for.
    expected = (largest[..., 0].transpose(1, 2) * key_largest[..., None] * 0.25 / math.log(2) / 127**2 / 16).clamp(
        min=2.0**-100
    )
    torch.testing.assert_close(factors.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_the_factors(value):
    q, k, _ = inputs(70)
    q[0, 3, 1, 5] = value
    k[1, 69, 0, 15] = value
    keys = k.transpose(1, 2)
    found = triton.quantise(q, [keys], [keys], triton_channels.channel_matrices(q, k), 1.0)
    expected = torch.ones(2, 2, 70, dtype=torch.bool)
    expected[0, 1, 3] = False
    expected[1, 0] = False
    assert torch.equal(found.factors.isfinite(), expected)


def test_equal_keys_are_zero():
    q, k, _ = inputs(70)
    keys = torch.ones_like(k).transpose(1, 2)
    found = triton.quantise(q, [keys], [keys], triton_channels.channel_matrices(q, k), 1.0)
    assert not found.keys[0].any() and found.factors.isfinite().all() and (found.factors > 0).all()


CASES = {
    "levels": (AttentionSpec(block_key=16, thresholds=(0.2, 0.5, 0.8)), 0, 0, False),
    "permuted, text": (AttentionSpec(block_key=16, thresholds=(0.2, 0.5, 0.8)), 3, 5, True),
    "no level 1, text after": (AttentionSpec(block_key=32, levels=(2, 8), thresholds=(0.5, 0.9)), 0, 7, False),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_make_the_attention_of_the_reference(name):
    """All blocks at one level: products of integers, times the factors, through a softmax in base 2."""
    spec, before, after, permuted = CASES[name]
    tokens = 101
    q, k, v = inputs(tokens + before + after, batch=1)
    layout = make_layout(len(q[0]), len(k[0]), before, after, torch.randperm(tokens) if permuted else None)
    built = pyramid.build_pyramid(k, v, layout, spec, gathered=True)
    scale = 0.3
    found = triton.quantise_rows(q, built, layout, spec, scale)
    assert [rows is not None for rows in found.keys] == [before > 0, after > 0, *(True for _ in spec.levels)]
    rows = reference_pyramid.pyramid_rows(layout, spec, like=k)
    query_tokens = layout.video_query_tokens(q.device)
    for level in range(len(spec.levels)):
        chosen = torch.full((1, 2, 1, -(-tokens // spec.block_key)), level)
        lists = BlockLists.from_levels(chosen, len(spec.levels))
        expected = reference_sparse.sparse_attention(
            q, k, v, lists, layout, AttentionSpec(**{**vars(spec), "precision": "int8_qk"}), scale
        )
        for h in range(2):
            values = torch.empty(len(rows.log_count), v.shape[3])
            reference_pyramid.build_pyramid(v[0, :, h], rows, out=values)
            attended = [slice(*rows.first_row[level : level + 2]), slice(rows.first_row[-1], None)]
            keys = torch.cat([found.keys[2 + level][0, h], *(x[0, h] for x in found.keys[:2] if x is not None)])
            queries = found.queries[0, query_tokens, h]
            products = queries.int() @ keys.int().T
            counts = torch.cat([rows.log_count[part] for part in attended])
            logits = products * found.factors[0, h, query_tokens, None] + counts / math.log(2)
            out = (logits * math.log(2)).softmax(-1) @ torch.cat([values[part] for part in attended])
            error = (out - expected[0, query_tokens, h]).norm() / expected[0, query_tokens, h].norm()
            # An entry in the middle of two integers may be rounded otherwise, which shows in what its token weighs.
            pooled = torch.empty(len(rows.log_count), k.shape[3])
            reference_pyramid.build_pyramid(k[0, :, h], rows, out=pooled)
            finest = torch.cat([pooled[slice(*rows.first_row[:2])], pooled[rows.first_row[-1] :]])
            of_queries, of_keys = reference.channel_matrices(reference.channel_scales(q[0, :, h : h + 1], k[0, :, h]))
            mean, largest = reference.key_mean_and_largest(finest @ of_keys)
            mine = reference.to_integers(torch.cat([pooled[part] for part in attended]) @ of_keys - mean, largest)
            of_this = q[0, query_tokens, h] @ of_queries
            theirs = reference.to_integers(of_this, reference.largest_of_queries(of_this))
            differences = torch.cat([(keys - mine).abs(), (queries - theirs).abs()])
            others = int((differences > 0).sum())
            assert differences.max() <= 1 and others <= 4
            assert error < 1e-4 + 3e-3 * others
