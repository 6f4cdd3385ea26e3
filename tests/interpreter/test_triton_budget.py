"""The Triton kernels of the rule `budget`, in Triton's interpreter.

Memory that is not initialized holds what is no number, so that whatever a kernel leaves unwritten shows.
"""

from __future__ import annotations

import random
from dataclasses import replace

import budget_checks
import not_finite
import pytest
import torch
import triton
import triton.language as tl

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.allocation import prices, triton_budget, triton_prices, triton_statistics, triton_steps
from psa_kernels.blocks import group_means
from psa_kernels.causal import triton_queries
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import triton as pyramid

# Whatever a kernel leaves unwritten shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(queries, keys=None, *, batch=1, heads=2, head_dim=24, dtype=torch.float32):
    """Fresh random q, k, v, views into wider tensors, whose keys and values have means far from 0."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, heads, head_dim + 3) for n in (queries, keys, keys)]
    q, k, v = (torch.randn(shape)[..., :head_dim] for shape in shapes)
    return [x.to(dtype) for x in (q, k + 1, v + 1)]


def unscaled(rows, head_dim):
    return (rows.fractions.double() * rows.tops[..., None])[..., :head_dim]


@pytest.mark.parametrize(
    ("block_key", "levels", "rest", "tokens"),
    [(16, (1, 2, 4), "skip", 83), (32, (2, 16), "mean", 83), (64, (1, 64), "skip", 83), (32, (1,), "skip", 1)],
    ids=str,
)
def test_statistics(block_key, levels, rest, tokens):
    spec = AttentionSpec(rule="budget", density=0.3, levels=levels, rest=rest, block_query=64, block_key=block_key)
    layout = make_layout(tokens + 5, tokens + 5, 2, 3, torch.randperm(tokens))
    q, k, v = inputs(tokens + 5, batch=2 if levels == (1, 2, 4) else 1, dtype=torch.float16)
    wide = [x[:, layout.video_key_tokens(x.device)].transpose(1, 2).double() for x in (q, k, v)]
    half = {"rtol": 2**-10, "atol": 1e-6}

    for how, read in ((Importance(), 8), (Importance(query_stride=64), 64), (Importance("pooled"), 1)):
        found = triton_statistics.query_energy(q, layout, replace(spec, importance=how), -0.3)
        expected = group_means((0.3 * wide[0][:, :, ::read]).square(), 64 // read)
        torch.testing.assert_close(unscaled(found, 24), expected, **half)
    centres, varied = triton_statistics.value_spread(v, layout, spec)
    torch.testing.assert_close(unscaled(centres, 24), group_means(wide[2], block_key), rtol=0, atol=2**-10 * 6)
    torch.testing.assert_close(unscaled(centres, 24).square().sum(-1), centres.squares.double(), rtol=1e-5, atol=0)
    spread = unscaled(triton_statistics.key_spread(k, layout, spec), 24)
    assert len(spread) == len(varied) == len(triton_statistics.pooled_factors(spec))
    for index, factor in enumerate(triton_statistics.pooled_factors(spec)):
        torch.testing.assert_close(spread[index], prices._spread(wide[1], factor, block_key), **half)
        expected = prices._spread(wide[2], factor, block_key).sum(-1)
        torch.testing.assert_close(varied[index].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [Importance(), Importance(query_stride=32), Importance("pooled")], ids=str)
@pytest.mark.parametrize("first", [2, 30, 65, 90, 128, 137])
def test_energy_of_causal_calls(first, how):
    """Whatever the queries begin with: text, a group of 8 or 32 queries, the inside of one, or the last query."""
    spec = AttentionSpec(rule="budget", density=0.3, block_query=64, block_key=16, importance=how)
    causal = CausalLayout(3, 135, 2, first, spec.block_query, spec.block_key)
    q, _, _ = inputs(140 - first, dtype=torch.float16)
    found = unscaled(triton_queries.query_energy(q, causal, spec, -0.3), 24)
    for index, row in enumerate(causal.rows):
        queries = 0.3 * q[:, causal.queries(row)].transpose(1, 2).double()
        expected = prices.query_energy(queries, spec, causal.span(row)[0] % spec.block_query)
        torch.testing.assert_close(found[:, :, index : index + 1], expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(
    ("levels", "gathered", "dtype"),
    [((1, 2, 4), True, torch.float16), ((1, 2, 4, 8), False, torch.float32), ((1, 4), True, torch.float32)],
    ids=str,
)
def test_what_is_pooled_in_the_same_pass_is_that_of_the_pyramid(levels, gathered, dtype):
    spec = AttentionSpec(rule="budget", density=0.3, levels=levels, block_query=64, block_key=16)
    layout = make_layout(88, 88, 2, 3, torch.randperm(83))
    _, k, v = inputs(88, batch=2, dtype=dtype)
    expected = pyramid.build_pyramid(k, v, layout, spec, gathered=gathered)
    assert triton_statistics.pools_alike(spec) and (1 in expected.factors) == gathered
    both = pyramid.empty_pyramid(k, v, layout, spec, gathered)
    spread = triton_statistics.key_spread(k, layout, spec, both.keys, both.factors)
    centres, varied = triton_statistics.value_spread(v, layout, spec, both.values, both.factors)
    assert both.factors == expected.factors
    assert torch.equal(both.keys, expected.keys) and torch.equal(both.values, expected.values)
    alone = triton_statistics.key_spread(k, layout, spec)
    assert torch.equal(spread.fractions, alone.fractions) and torch.equal(spread.tops, alone.tops)
    centres_alone, varied_alone = triton_statistics.value_spread(v, layout, spec)
    assert torch.equal(varied, varied_alone)
    for name in ("fractions", "tops", "squares"):
        assert torch.equal(getattr(centres, name), getattr(centres_alone, name))


@pytest.mark.parametrize("levels", [(1,), (1, 2, 4), (1, 16)], ids=str)
def test_calls_choose_what_select_blocks_chooses(levels):
    """Whether the pyramids are filled in the same pass, in passes of their own, or not at all."""
    spec = AttentionSpec(rule="budget", density=0.3, levels=levels, block_query=64, block_key=16)
    q, k, v = inputs(157, heads=1, dtype=torch.float16)
    options = {"text_before": 3, "permutation": torch.randperm(154), "implementation": "triton"}
    chosen = select_blocks(q, k, spec, v=v, **options)
    out, lists = psa_attention(q, k, v, spec, return_lists=True, **options)
    assert torch.equal(lists.ids, chosen.ids) and torch.equal(lists.counts, chosen.counts)
    assert lists.pooling == chosen.pooling == levels
    assert torch.equal(out, psa_attention(q, k, v, spec, lists=chosen, **options))


def test_the_pyramid_of_larger_groups_is_made_by_its_own_kernel():
    assert not triton_statistics.pools_alike(AttentionSpec(rule="budget", density=0.3, levels=(1, 16)))


@pytest.mark.parametrize(("levels", "rest"), budget_checks.LEVELS, ids=str)
def test_prices(levels, rest):
    """Off by at most two steps, each 0.27 %, although values have a common mean far from 0."""
    dtype = random.choice([torch.float32, torch.float16])
    how = Importance("sampled", "max", 8, 8)
    spec = AttentionSpec(rule="budget", density=0.3, levels=levels, rest=rest, block_query=64, importance=how)
    layout = make_layout(705, 705, 2, 3, torch.randperm(700))
    off = budget_checks.price_steps_off(*inputs(705, heads=1, dtype=dtype), layout, spec, 0.3)
    assert off.max() <= 2 and (off > 1).float().mean() <= 0.03


@triton.jit
def log_kernel(x_ptr, found_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(found_ptr + place, triton_steps.log_steps(tl.load(x_ptr + place), 3.0, 256))


def test_logarithms():
    x = torch.exp2(torch.cat([torch.rand(4000) * 250 - 125, torch.arange(-48.0, 48.0)])).float()
    found = torch.empty_like(x)
    log_kernel[(1,)](x, found, SIZE=4096)
    assert (found - 3 - 256 * x.double().log2()).abs().max() < 256 / 8000


def test_a_row_whose_importance_is_not_a_number_has_no_prices():
    spec = AttentionSpec(rule="budget", density=0.3, block_query=64, block_key=16)
    q, k, v = inputs(130)
    importance = torch.rand(1, 2, 3, 9)
    importance[0, 1, 2, 4] = torch.nan
    found = triton_prices.upgrade_prices(q, k, v, importance, make_layout(130, 130, 0, 0, None), spec, 0.3)
    assert (found[:, 0, 1, 2] == 0).all() and (found[:, 0, 1, 1] > 0).any()


def test_prices_of_fitted_constants():
    how = Importance("sampled", "mean", 8, 8)
    spec = AttentionSpec(rule="budget", density=0.3, block_query=64, importance=how, error_model="fitted")
    off = budget_checks.price_steps_off(*inputs(300, heads=1), make_layout(300, 300, 0, 0, None), spec, 0.3)
    assert off.max() <= 3 and (off > 1).float().mean() <= 0.05


def test_prices_of_magnitudes_that_float16_cannot_hold():
    spec = AttentionSpec(rule="budget", density=0.3, block_query=64, block_key=32, levels=(1, 2, 8))
    q, k, v = inputs(150, 310)
    layout = make_layout(150, 310, 0, 0, None)
    off = budget_checks.price_steps_off(1e-6 * q, 1e6 * k, 1e7 * v, layout, spec, 0.3)
    assert off.max() <= 2


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(("levels", "rest"), budget_checks.LEVELS, ids=str)
def test_lists_are_those_of_the_reference_bit_for_bit(levels, rest, index):
    density = budget_checks.random_densities(rest)[index]
    kind, key_blocks = random.choice(["far", "close", "ends", "bell"]), random.choice([1, 20, 40, 130])
    budget_checks.check_same_lists(kind, levels, rest, density, (1, 1, 2, key_blocks))


@pytest.mark.parametrize("guesses", [0, 1, 4])
def test_rows_of_several_warps(guesses, monkeypatch):
    shape = {"WORDS": 32, "CHUNK": 64, "num_warps": 4}
    monkeypatch.setattr(triton_budget, "row_shape", lambda _: shape)
    monkeypatch.setattr(triton_budget, "guesses", lambda _: guesses)
    triton_budget._plan.cache_clear()
    for kind in ("far", "close", "bell"):
        budget_checks.check_same_lists(kind, (1, 2, 4), "skip", 0.2, (2, 2, 1, 150))


@pytest.mark.parametrize(("levels", "rest"), budget_checks.LEVELS, ids=str)
def test_rows_of_several_chunks(levels, rest, monkeypatch):
    monkeypatch.setattr(triton_budget, "row_shape", lambda _: {"WORDS": 32, "CHUNK": 64, "num_warps": 1})
    triton_budget._plan.cache_clear()
    for kind, key_blocks in (("ends", 149), ("close", 192), ("bell", 193)):
        density = random.choice(budget_checks.random_densities(rest))
        budget_checks.check_same_lists(kind, levels, rest, density, (1, 1, 2, key_blocks))


@pytest.mark.parametrize(("levels", "rest"), [((1, 2, 4), "skip"), ((2, 8), "mean")], ids=str)
def test_the_whole_operator(levels, rest):
    spec = AttentionSpec(rule="budget", density=0.3, levels=levels, rest=rest, block_query=64, block_key=16)
    q, k, v = inputs(157, heads=1)
    options = {"text_before": 3, "text_after": 4, "permutation": torch.randperm(150)}
    call = {"implementation": "triton", "return_stats": True, "return_lists": True, **options}
    out, stats, lists = psa_attention(q, k, v, spec, **call)
    assert stats.implementation == "triton" and (stats.density <= 0.3).all() and (stats.density > 0.2).all()
    wide = [x.double() for x in (q, k, v)]
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("which", "value"), [("q", "nan"), ("v", "huge")])
def test_values_that_are_not_finite(which, value):
    not_finite.check_lists(which, value, not_finite.make_spec("budget"), "triton", tokens=80)


def test_wide_offsets_change_nothing(monkeypatch):
    spec = AttentionSpec(rule="budget", density=0.3, block_query=64, block_key=16)
    q, k, v = inputs(75, heads=1)
    narrow = select_blocks(q, k, spec, v=v, implementation="triton")
    monkeypatch.setattr(triton_statistics, "are_wide", lambda *_: True)
    monkeypatch.setattr(triton_statistics, "_prepared", triton_statistics._prepared.__wrapped__)
    assert torch.equal(select_blocks(q, k, spec, v=v, implementation="triton").ids, narrow.ids)
