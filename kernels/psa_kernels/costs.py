"""What the levels of a key block cost, in whole numbers, and what a row may cost under the rule `budget`."""

from __future__ import annotations

import math

from psa_kernels.blocks import ranks_below
from psa_kernels.spec import AttentionSpec


def unit_costs(spec: AttentionSpec) -> list[int]:
    """Cost of a key block at each level, and last past the levels, in units of which each is a whole number."""
    unit = math.lcm(*spec.factors)
    return [unit // factor for factor in spec.levels] + [unit // spec.block_key if spec.rest == "mean" else 0]


def row_budget(spec: AttentionSpec, key_blocks: int) -> int:
    """What a row may cost, in the same units."""
    if spec.density is None:
        raise ValueError(f"rule={spec.rule!r}: only the rule 'budget' has a budget")
    unit = unit_costs(spec)[0] * spec.levels[0]
    # In exact arithmetic the product may be a whole number, of which float64 falls short.
    return math.floor(spec.density * unit * key_blocks + 1e-6)


def most_attended(spec: AttentionSpec, key_blocks: int) -> int:
    """How many key blocks a row can attend under the rule `budget`: as many as it can pay at the coarsest level."""
    if spec.rest == "mean":
        return key_blocks
    # The most important block is attended whatever it costs.
    return min(key_blocks, max(1, row_budget(spec, key_blocks) // unit_costs(spec)[-2]))


def expected_density(spec: AttentionSpec, key_blocks: int) -> float | None:
    """The density of every call with that many key blocks, as far as it does not depend on the tensors.

    Returns:
        Under the rule `count` the density that `AttentionStats` will tell. Under `budget` what a row can spend, of
        which less than a step between two levels may be left over. None under `mass`, and where a similarity cap
        decides too: these depend on the tensors.
    """
    if spec.rule == "budget":
        units = unit_costs(spec)
        whole = units[0] * spec.levels[0] * key_blocks
        least = units[-2] if spec.rest == "skip" else 0
        # The most important block is attended whatever it costs, and none is dearer than at the finest level.
        return min(max(row_budget(spec, key_blocks), least), units[0] * key_blocks) / whole
    if spec.rule == "mass" or spec.similarity is not None:
        return None
    ends = [ranks_below(max(threshold, spec.floor), key_blocks) for threshold in spec.thresholds]
    cost = sum((end - start) / factor for start, end, factor in zip([0, *ends], ends, spec.levels, strict=False))
    if spec.rest == "mean":
        cost += (key_blocks - ends[-1]) / spec.block_key
    return cost / key_blocks
