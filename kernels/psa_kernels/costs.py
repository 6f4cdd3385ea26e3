"""What the levels of a key block cost, in whole numbers, and what a row may cost under the rule `budget`."""

from __future__ import annotations

import math

from psa_kernels.spec import AttentionSpec


def unit_costs(spec: AttentionSpec) -> list[int]:
    """Cost of a key block at each level, and last past the levels, in units of which each is a whole number."""
    unit = math.lcm(*spec.levels, *((spec.block_key,) if spec.rest == "mean" else ()))
    return [unit // factor for factor in spec.levels] + [unit // spec.block_key if spec.rest == "mean" else 0]


def row_budget(spec: AttentionSpec, key_blocks: int) -> int:
    """What a row may cost, in the same units."""
    unit = unit_costs(spec)[0] * spec.levels[0]
    # The product may fall short of the whole number that it is in exact arithmetic.
    return math.floor(spec.density * unit * key_blocks + 1e-6)


def most_attended(spec: AttentionSpec, key_blocks: int) -> int:
    """How many key blocks a row can attend under the rule `budget`: as many as it can pay at the coarsest level."""
    if spec.rest == "mean":
        return key_blocks
    # The most important block is attended whatever it costs.
    return min(key_blocks, max(1, row_budget(spec, key_blocks) // unit_costs(spec)[-2]))
