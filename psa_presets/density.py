"""Finds the thresholds, or the budget, that give a density."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from psa_presets.errors import refusal
from psa_presets.fields import LayerSettings, Rule

# Keys that no rule may change if all sparse layers are to have the same density at all sparse steps.
DECISIVE = ("block", "levels", "rule", "thresholds", "density", "floor", "similarity", "rest")

DIGITS = 6  # of scaled thresholds


def scaled_thresholds(thresholds: Iterable[float], factor: float, digits: int = DIGITS) -> tuple[float, ...]:
    """Cumulative shares times a factor, rounded, none above 1."""
    return tuple(min(1.0, round(threshold * factor, digits)) for threshold in thresholds)


def allocation_at(settings: LayerSettings, rules: Mapping[str, Sequence[Rule]], density: float) -> dict[str, Any]:
    """The keys of a preset to change for a density, and their new values: see `Preset.at_density`.

    Args:
        rules: the preset's rules, under `layers` and `steps`.

    Raises:
        PresetError: the density is out of reach, depends on the video, or is not the same in all sparse layers and at
            all sparse steps.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise refusal("density", density, "not a share of dense attention", "a number above 0 and up to 1")
    for what, index, rule in ((what, *each) for what, some in rules.items() for each in enumerate(some)):
        for key in DECISIVE:
            if key in rule.model_fields_set:
                allowed = f"for one density in all sparse {what}, rules without {', '.join(DECISIVE)}"
                raise refusal(f"{what}[{index}].{key}", getattr(rule, key), f"gives {what} another density", allowed)
    if settings.rule == "mass":
        raise refusal("rule", "mass", "the density depends on the video", "count or budget; psa-calibrate scales mass")
    if settings.similarity is not None:
        raise refusal("similarity", settings.similarity, "the density depends on the video", "null")
    if settings.rule == "budget":
        return {"density": float(density)}
    factor = _factor(settings, density)
    floor = {"floor": scaled_thresholds([settings.floor], factor)[0]} if settings.floor else {}
    return {"thresholds": scaled_thresholds(settings.thresholds, factor), **floor}


def _factor(settings: LayerSettings, density: float) -> float:
    """The factor for the thresholds and the floor of the rule `count`; products above 1 are cut to 1."""
    ends = [max(threshold, settings.floor) for threshold in settings.thresholds]
    rest = 1 / settings.block.key if settings.rest == "mean" else 0.0
    # The density is `rest`, plus for each level its end times how much more a block costs there than at the next level.
    weights = [cost - next_cost for cost, next_cost in pairwise([*(1 / level for level in settings.levels), rest])]
    highest = rest + sum(weight for weight, end in zip(weights, ends, strict=True) if end)
    if not rest < density <= highest + 1e-9:
        reason = f"out of reach for the thresholds {list(settings.thresholds)} of the levels {list(settings.levels)}"
        raise refusal("density", density, reason, f"a number above {rest:g} and up to {highest:g}")
    factor = 0.0
    for below in range(len(ends), 0, -1):  # assume that so many ends stay below 1 and the later ones are cut
        slope = sum(weight * end for weight, end in zip(weights[:below], ends, strict=False))
        if not slope:
            break
        factor = (density - rest - sum(weights[below:])) / slope
        if factor * ends[below - 1] <= 1 + 1e-9:
            break
    if not any(scaled_thresholds(settings.thresholds, factor)):
        smallest = 10**-DIGITS / settings.thresholds[-1]
        lowest = rest + sum(weight * min(1.0, end * smallest) for weight, end in zip(weights, ends, strict=True))
        reason = f"rounded to {DIGITS} digits, all thresholds would be 0"
        raise refusal("density", density, reason, f"a number from {lowest:.8g} to {highest:g}")
    return factor
