"""Turns the user's target (a density, a PSNR, a speedup) into the mean density that the layers should have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from psa_diffusers.errors import InputError

TRIALS = 5
CLOSE_ENOUGH = 0.3  # dB above the target PSNR


@dataclass(frozen=True)
class Target:
    """`kind` is psnr (dB against dense), density (of the sparse steps) or speedup (of denoising)."""

    kind: str
    value: float

    def __str__(self) -> str:
        return {"psnr": "PSNR {:g} dB", "density": "density {:g}", "speedup": "speedup {:g}x"}[self.kind].format(
            self.value
        )


def one_target(psnr: float | None, density: float | None, speedup: float | None, dense_share: float) -> Target:
    """The one target that was given.

    Args:
        dense_share: share of the steps that the base preset keeps dense.

    Raises:
        InputError: none or several were given, or it is out of range.
    """
    given = [
        (kind, value)
        for kind, value in (("psnr", psnr), ("density", density), ("speedup", speedup))
        if value is not None
    ]
    if len(given) != 1:
        raise InputError("give one target: --target-psnr, --density or --speedup")
    kind, value = given[0]
    if kind == "psnr" and not 5 <= value <= 55:
        raise InputError(f"--target-psnr {value:g}: must be from 5 to 55 dB")
    if kind == "density" and not 0.01 <= value <= 0.95:
        raise InputError(f"--density {value:g}: must be from 0.01 to 0.95")
    if kind == "speedup":
        limit = math.inf if not dense_share else 1 / dense_share
        if not 1 < value < limit:
            reason = f"and below {limit:.2f}, because the base preset keeps {dense_share:.0%} of the steps dense"
            raise InputError(f"--speedup {value:g}: must be above 1" + (f" {reason}" if dense_share else ""))
    return Target(kind, value)


def density_for_psnr(
    target: float, lowest: float, psnr_at: Callable[[float], float]
) -> tuple[float, list[tuple[float, float]]]:
    """Find a density whose PSNR meets a target, by bisection on its logarithm. Also returns all that was tried.

    The result is the lowest tried density that meets the target; if none meets it, the highest tried one.

    Args:
        lowest: the lowest possible density.
        psnr_at: tries a density and returns the PSNR.
    """
    tried: list[tuple[float, float]] = []
    low, high = math.log(max(lowest, 0.01)), math.log(0.9)
    guess = min(max(math.log(0.25), low), high)
    for _ in range(TRIALS):
        density = math.exp(guess)
        psnr = psnr_at(density)
        tried.append((density, psnr))
        if 0 <= psnr - target <= CLOSE_ENOUGH:
            break
        low, high = (guess, high) if psnr < target else (low, guess)
        guess = _between(low, high, tried, target)
        if high - low < 0.02:
            break
    met = [density for density, psnr in tried if psnr >= target]
    return (min(met) if met else max(density for density, _ in tried)), tried


def density_for_speedup(target: float, steps: int, dense_steps: int, timed: dict[str, Any], lowest: float) -> float:
    """The density at which denoising takes 1 / target of the dense time, by a line through two timed densities.

    Args:
        timed: `dense`, the seconds of a dense step, and `sparse`, two pairs of density and seconds of a sparse step.

    Raises:
        InputError: that needs a density below the lowest possible one, or time does not depend on the density here.
    """
    (d_low, s_low), (d_high, s_high) = sorted(timed["sparse"])
    # Where blocks are few, both timings may be of the lowest density that there is.
    slope = (s_high - s_low) / (d_high - d_low) if d_high > d_low else 0.0
    if slope <= 0:
        raise InputError(
            f"--speedup {target:g}: on this machine a sparse step takes {s_low:.3g} s at density {d_low:.2f} "
            f"and {s_high:.3g} s at {d_high:.2f}: the work does not set the time here, so no density can be found"
        )
    wanted = (steps * timed["dense"] / target - dense_steps * timed["dense"]) / (steps - dense_steps)
    best = (
        steps
        * timed["dense"]
        / (dense_steps * timed["dense"] + (steps - dense_steps) * (s_low + slope * (lowest - d_low)))
    )
    density = d_low + (wanted - s_low) / slope
    if density < lowest:
        raise InputError(
            f"--speedup {target:g}: out of reach; at density {lowest:.2f} denoising is {best:.2f} times as fast as "
            "dense here"
        )
    return min(density, 0.95)


def _between(low: float, high: float, tried: list[tuple[float, float]], target: float) -> float:
    """The next guess: where a line through the last two trials meets the target, but inside the interval."""
    middle = (low + high) / 2
    if len(tried) < 2:
        return middle
    (d_a, p_a), (d_b, p_b) = tried[-2:]
    slope = (p_b - p_a) / (math.log(d_b) - math.log(d_a)) if d_a != d_b else 0.0
    if slope <= 0:
        return middle
    # Aim a little above: meeting the target matters more than the last percent of work.
    guess = math.log(d_b) + (target + CLOSE_ENOUGH / 2 - p_b) / slope
    margin = 0.1 * (high - low)
    return min(max(guess, low + margin), high - margin)
