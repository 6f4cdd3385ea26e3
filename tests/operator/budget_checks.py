"""What the kernels of the rule `budget` owe to their reference; tests in `interpreter/` and on a GPU use it."""

from __future__ import annotations

import random

import torch

from psa_kernels import AttentionSpec
from psa_kernels.allocation import budget, prices, triton_budget, triton_prices
from psa_kernels.allocation.prices import HIGHEST_PRICE
from psa_kernels.importance import reference as importance

# Levels, and what happens past the last.
LEVELS = [((1, 2, 4), "skip"), ((1,), "skip"), ((2, 4), "mean"), ((1, 2, 4, 8, 16), "skip"), ((1, 64), "mean")]


def price_steps_off(q, k, v, layout, spec, scale, **tensors):
    """By how many of 256 steps an octave prices are off those of float64: int32 `[levels, B, H, Mq, M]`.

    Args:
        tensors: perhaps `importance`; else it is that of float64.
    """
    wide = [x.double() for x in (q, k, v)]
    found = tensors.get("importance", importance.block_importance(*wide[:2], layout, spec, scale))
    expected = prices.upgrade_prices(*wide, found.double(), layout, spec, scale)
    made = triton_prices.upgrade_prices(q, k, v, found.float(), layout, spec, scale)
    assert made.shape == expected.shape and made.dtype == torch.int16
    padding = made.as_strided((*made.shape[:-1], made.stride(3)), made.stride())[..., made.shape[-1] :]
    assert (padding == HIGHEST_PRICE).all()
    return (made.int() - expected.int()).abs()


def random_prices(kind, levels, shape, device="cpu"):
    """Prices as the kernel leaves them: far apart, close together with many equal ones, at both ends, or in a bell."""
    if kind == "far":
        drawn = torch.randint(0, HIGHEST_PRICE + 1, (levels, *shape), device=device)
    elif kind == "close":
        drawn = torch.randint(9000, 9004, (levels, *shape), device=device)
    elif kind == "bell":
        drawn = (13000 + 900 * torch.randn(levels, *shape, device=device)).clamp(0, HIGHEST_PRICE).int()
    else:
        drawn = torch.randint(0, 2, (levels, *shape), device=device) * HIGHEST_PRICE
    made = triton_prices.empty_prices(levels, *shape, device=drawn.device)
    made.as_strided((*made.shape[:-1], made.stride(3)), made.stride()).fill_(HIGHEST_PRICE)
    return made.copy_(drawn.sort(0).values)


def check_same_lists(kind, levels, rest, density, shape, device="cpu"):
    """Bit for bit those of the reference."""
    spec = AttentionSpec(rule="budget", density=density, levels=levels, rest=rest)
    given = random_prices(kind, len(levels), shape, device)
    # Several blocks of a row are the most important one, and the rows are longer than what of them counts.
    importance = (4 * torch.rand(*shape[:3], shape[3] + 16, device=device)).round()[..., : shape[3]]
    expected = budget.allocate_budget(given, importance, spec)
    found = triton_budget.allocate_budget(given, importance, spec)
    for name in ("ids", "counts"):
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name)), (kind, levels, rest, density)


def random_densities(rest):
    """A few, some below the cost of one block."""
    least = 1 / 64 if rest == "mean" else 0.001
    return [max(least, share) for share in (0.002, random.uniform(0.02, 0.4), random.uniform(0.4, 0.99), 1.0)]
