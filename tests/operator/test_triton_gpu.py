"""The Triton kernels on a GPU, in half precision, over random shapes and specs."""

from __future__ import annotations

import gc
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import poison_free_memory, relative_error

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import make_layout
from psa_kernels.pyramid import reference as pyramid

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def random_case(seed):
    """A spec, inputs and options; everything the kernels distinguish occurs within a few dozen seeds."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    head_dim = chance.choice([64, 128, 128, 96, 40, 256])
    block_key = chance.choice([16, 32, 64, 64, 128, 256])
    levels = sorted(chance.sample([1, 2, 4, 8, 16], chance.choice([1, 2, 3, 4])))
    thresholds = sorted(chance.random() for _ in levels)
    thresholds[-1] = 1.0 if chance.random() < 0.2 else max(thresholds[-1], 0.1)
    spec = AttentionSpec(
        block_query=chance.choice([64, 128]),
        block_key=block_key,
        levels=tuple(levels),
        thresholds=tuple(thresholds),
        rule=chance.choice(["count", "mass"]),
        floor=chance.choice([0.0, 0.1]),
        similarity=chance.choice([None, (0.02,) * (len(levels) - 1)]),
        importance=Importance(
            chance.choice(["sampled", "pooled"]), chance.choice(["max", "mean"]), chance.choice([4, 8]), 4
        ),
        rest=chance.choice(["skip", "mean"]),
    )
    before, after = chance.choice([(0, 0), (7, 0), (0, 77), (226, 3)])
    video = chance.randint(200, 3000)
    keys = chance.choice([video, chance.randint(100, 3000)])
    permutation = torch.randperm(video, device="cuda") if keys == video and chance.random() < 0.5 else None
    dtype = chance.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    batch = chance.choice([1, 2])
    shapes = [(batch, n + before + after, 3, head_dim + 8) for n in (video, keys, keys)]
    q, k, v = ((1.5 * torch.randn(shape, device="cuda")).to(dtype)[..., :head_dim] for shape in shapes)
    return (q, k, v, spec), {"text_before": before, "text_after": after, "permutation": permutation}


@pytest.mark.parametrize("seed", range(60))
def test_error_is_that_of_dense_half_precision(seed, monkeypatch):
    """Against float64: no larger than 1.5 times the error of dense attention in the same dtype.

    That holds for the pyramid as it is stored, its means rounded to that dtype. What the rounding of the means adds
    is bounded apart.
    """
    (q, k, v, spec), options = random_case(seed)
    lists = select_blocks(q, k, spec, implementation="triton", **options)
    wide = [x.double() for x in (q, k, v)]
    exact_means = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    group_means = pyramid.group_means

    def rounded_means(x, size, out):
        group_means(x, size, out=out)
        out.copy_(out.to(q.dtype))

    monkeypatch.setattr(pyramid, "group_means", rounded_means)
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    poison_free_memory()
    out, stats = psa_attention(q, k, v, spec, lists=lists, implementation="triton", return_stats=True, **options)
    assert stats.implementation == "triton"
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in wide))
    assert relative_error(out, expected) <= 1.5 * relative_error(dense, exact)
    assert relative_error(out, exact_means) <= 2.5 * relative_error(dense, exact)
    poison_free_memory()
    assert torch.equal(psa_attention(q, k, v, spec, implementation="triton", **options), out)


@pytest.mark.parametrize("seed", range(30))
def test_lists_are_those_of_the_reference_bit_for_bit(seed):
    from psa_kernels.allocation import reference, triton

    (_, _, _, spec), _ = random_case(seed)
    blocks = random.Random(seed).choice([3, 100, 1182, 1857, 4725, 16384])
    smooth = torch.rand(1, 2, 5, blocks, device="cuda") ** 8
    for importance in (smooth, (smooth * 8).round() + 0.5):
        coarsest = torch.randint(0, len(spec.levels), (1, 2, blocks), device="cuda")
        found = triton.allocate(importance, coarsest.int(), spec)
        expected = reference.allocate(importance, coarsest, spec)
        assert torch.equal(found.counts, expected.counts) and torch.equal(found.ids, expected.ids)


def test_no_call_waits_for_the_device_or_keeps_memory():
    (q, k, v, spec), options = random_case(1)
    _output, stats = psa_attention(q, k, v, spec, return_stats=True, **options)
    assert stats.implementation in ("triton", "hopper")
    del stats
    torch.cuda.synchronize()
    gc.collect()  # What earlier tests left must not be freed in between.
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            psa_attention(q, k, v, spec, return_stats=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_offsets_beyond_32_bits():
    """One head whose tokens lie so far apart that the last are 2^31 elements away from the first."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    tokens, stride = 70_000, 1 << 15
    x = torch.empty(tokens * stride, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x[offset:].as_strided((1, tokens, 1, 64), (0, stride, 64, 1)) for offset in (0, 64, 128))
    for y in (q, k, v):
        y.normal_()
    spec = AttentionSpec()
    near = psa_attention(*(y.contiguous() for y in (q, k, v)), spec, implementation="triton")
    assert torch.equal(psa_attention(q, k, v, spec, implementation="triton"), near)


def budget_case(seed):
    """A case of `random_case` under the rule `budget`."""
    (q, k, v, spec), options = random_case(seed)
    density = random.Random(seed).choice([0.04, 0.15, 0.4, 1.0])
    spec = replace(spec, rule="budget", floor=0.0, similarity=None, density=max(density, 1 / spec.block_key))
    return (q, k, v, spec), options


@pytest.mark.parametrize("seed", range(30))
def test_prices_are_close_to_those_of_float64(seed):
    import budget_checks

    (q, k, v, spec), options = budget_case(seed)
    layout = make_layout(q.shape[1], k.shape[1], **options)
    found = block_importance(q, k, layout, spec, 0.1)
    poison_free_memory()
    off = budget_checks.price_steps_off(q, k, v, layout, spec, 0.1, importance=found)
    # Steps of 0.27 %.
    assert (off > 2).float().mean() <= 0.001 and (off > 1).float().mean() <= 0.03


@pytest.mark.parametrize("seed", range(30))
def test_lists_of_a_budget_are_those_of_the_reference_bit_for_bit(seed):
    import budget_checks

    chance = random.Random(seed)
    blocks = chance.choice([1, 3, 100, 1182, 1857, 4725, 16384])
    levels, rest = budget_checks.LEVELS[seed % len(budget_checks.LEVELS)]
    for kind in ("far", "close", "ends", "bell"):
        for density in budget_checks.random_densities(rest):
            poison_free_memory()
            budget_checks.check_same_lists(kind, levels, rest, density, (1, 2, 5, blocks), "cuda")


@pytest.mark.parametrize("seed", range(12))
def test_the_rule_budget_inside_the_operator(seed):
    (q, k, v, spec), options = budget_case(seed)
    lists = select_blocks(q, k, spec, v=v, implementation="triton", **options)
    poison_free_memory()
    out, stats = psa_attention(q, k, v, spec, implementation="triton", return_stats=True, **options)
    # A row's most important block is attended even where it alone costs more than the budget.
    one_block = 1 / (spec.levels[-1] * lists.key_blocks)
    assert (stats.density <= max(spec.density, one_block) + 1e-6).all()
    assert torch.equal(psa_attention(q, k, v, spec, lists=lists, implementation="triton", **options), out)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("levels", [(1, 2, 4), (1, 2, 4, 8), (1, 4)], ids=str)
@pytest.mark.parametrize("gathered", [True, False])
def test_what_a_budget_pools_on_the_way_is_the_pyramid_bit_for_bit(gathered, levels, head_dim):
    """And what it learns on the way is what it learns without, to rounding: the compiler may join products and sums."""
    from psa_kernels.allocation import triton_statistics as statistics
    from psa_kernels.pyramid import triton as pyramids

    spec = AttentionSpec(rule="budget", density=0.25, levels=levels)
    k, v = (torch.randn(2, 3000, 3, head_dim, device="cuda").to(torch.bfloat16) + 1 for _ in range(2))
    layout = make_layout(3000, 3000, 20, 3, torch.randperm(2977, device="cuda"))
    expected = pyramids.build_pyramid(k, v, layout, spec, gathered=gathered)
    poison_free_memory()
    both = pyramids.empty_pyramid(k, v, layout, spec, gathered)
    spread = statistics.key_spread(k, layout, spec, both.keys, both.factors)
    centres, varied = statistics.value_spread(v, layout, spec, both.values, both.factors)
    assert torch.equal(both.keys, expected.keys) and torch.equal(both.values, expected.values)
    alone, (centres_alone, varied_alone) = (
        statistics.key_spread(k, layout, spec),
        statistics.value_spread(v, layout, spec),
    )
    for found, wanted in ((spread, alone), (centres, centres_alone)):
        torch.testing.assert_close(found.tops, wanted.tops, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.fractions, wanted.fractions, rtol=0, atol=2**-10)  # float16, at most 1
    torch.testing.assert_close(varied, varied_alone, rtol=1e-5, atol=0)


def test_a_call_with_a_budget_does_not_wait_for_the_device():
    (q, k, v, spec), options = budget_case(1)
    psa_attention(q, k, v, spec, **options)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        psa_attention(q, k, v, spec, return_stats=True, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
