"""From errors of levels to prices, in Triton: what every pair of blocks has to pay for in instructions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def price_steps(
    errors, importance, total, LEVELS: tl.constexpr, BLOCK_KEY: tl.constexpr, SKIP: tl.constexpr,
    EXPONENT: tl.constexpr, STEPS: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Prices of each level, a tuple of int32 `[rows, blocks]`.

    Args:
        errors: of each level and of what lies past the last, but for the factor of mass: a tuple of `[rows, blocks]`.
        importance, total: `[rows, blocks]`, and its sum over each row: `[rows]`.
    """
    # What multiplies every error of a pair multiplies its prices. A share of 0 counts as 2^-127. Where a row's sum is
    # not a number no price is more than 0.
    row = tl.where(total == total, log_steps(total, 0.0, STEPS) * EXPONENT, float("inf"))
    # A half less is rounded to the nearest step: the price is the step below.
    share = log_steps(importance, 0.0, STEPS) * EXPONENT + (HIGHEST // 2 - 0.5 - row)[:, None]
    price = tl.zeros_like(share)
    prices = ()
    for level in tl.static_range(len(LEVELS)):
        slope = least_slope(errors, level, LEVELS, BLOCK_KEY, SKIP)
        # False for what is not a number.
        steps = tl.where(slope >= 0, log_steps(slope, share, STEPS), 0.0)
        price = tl.maximum(price, tl.minimum(steps, HIGHEST))
        # 2^23 shifts the step to the last bits of a float.
        prices += ((price + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000,)
    return prices


@triton.jit
def log_steps(x, bias, STEPS: tl.constexpr):
    """`bias` plus the log2 of numbers that are not negative in `STEPS` an octave, off by at most 1/8000 of an octave.

    The bits of a float, read as an integer, are its logarithm but for the mantissa 1 + f, of which f stands for
    log2(1 + f). The difference is f (1 - f) times what is nearly a parabola. PyTorch's and CUDA's log2 is off by less
    and takes three times as many instructions.
    """
    bits = x.to(tl.int32, bitcast=True)
    linear = bits.to(tl.float32) * (STEPS / 8388608.0) + (bias - 127.0 * STEPS)
    f = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    parabola = (f * (0.08212941 * STEPS) - 0.23905666 * STEPS) * f + 0.43872534 * STEPS
    return (f - f * f) * parabola + linear


@triton.jit
def least_slope(errors, LEVEL: tl.constexpr, LEVELS: tl.constexpr, BLOCK_KEY: tl.constexpr, SKIP: tl.constexpr):
    """The least error that a level spares for each unit of cost, against any coarser choice; 0 if there is none."""
    if per_cost(LEVELS, LEVEL, len(LEVELS), BLOCK_KEY, SKIP) == 0:
        return tl.zeros(errors[LEVEL].shape, tl.float32)
    else:
        least = (errors[LEVEL + 1] - errors[LEVEL]) * per_cost(LEVELS, LEVEL, LEVEL + 1, BLOCK_KEY, SKIP)
        for other in tl.static_range(LEVEL + 2, len(errors)):
            slope = (errors[other] - errors[LEVEL]) * per_cost(LEVELS, LEVEL, other, BLOCK_KEY, SKIP)
            least = tl.minimum(least, slope, tl.PropagateNan.ALL)
        return least


@triton.constexpr_function
def per_cost(levels, level, coarser, block_key, skip):
    """1 / what a coarser choice costs less, in shares of the cost of a block's tokens; 0 if it costs no less."""
    costs = [1 / factor for factor in levels] + [0.0 if skip else 1 / block_key]
    saved = costs[level] - costs[coarser]
    return 1 / saved if saved > 0 else 0
