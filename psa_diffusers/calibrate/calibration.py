"""A calibration from end to end: measure, choose, try, write the preset, verify it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from psa_diffusers.calibrate.choose import Layers, Solution, error, reach, solve
from psa_diffusers.calibrate.measure import curves_of
from psa_diffusers.calibrate.plan import Calibration, check
from psa_diffusers.calibrate.result import make_preset, write
from psa_diffusers.calibrate.runner import Presets, Runs
from psa_diffusers.calibrate.shapes import shapes_for
from psa_diffusers.calibrate.store import Store
from psa_diffusers.calibrate.targets import density_for_psnr, density_for_speedup
from psa_diffusers.calibrate.trials import Assignment, Candidate, Result, Trial, candidates, keep, mean_psnr, try_out
from psa_diffusers.calibrate.verify import is_met, verify
from psa_diffusers.errors import InputError
from psa_diffusers.runs import stopping

Curves = dict[str, Layers]  # by transformer, as the next
Solutions = dict[str, Solution]
# Settings that neither PSNR nor measurements depend on.
UNIMPORTANT = ("preset", "compare", "strict", "samples", "model")
TIMED = (0.12, 0.4)
CLOSE_ENOUGH = 0.005  # relative, between the density of single calls and that of videos
FAR_OFF = 0.03  # relative too: a candidate whose density is so far off is tried once more
TRIED_DENSITY = 0.25  # at which shapes are compared if the target is no density


@stopping.carried_out()
def calibrate(calibration: Calibration, tell: Callable[[str], None]) -> dict[str, Any]:
    """Carry out a calibration, or continue one that was stopped; return the summary.

    Args:
        tell: called with each line of progress.

    Raises:
        InputError: as `check`; or the kept measurements are of other settings; or the target is out of reach.
        PSAFallbackError: attention would be dense; the message says why.
    """
    check(calibration)
    plan, target = calibration.plan, calibration.target
    settings = {name: value for name, value in plan.settings.to_dict().items() if name not in UNIMPORTANT}
    store = Store(calibration.folder, {**settings, "batch": calibration.batch}, calibration.overwrite)
    runs = Runs(calibration, store, tell)
    tell(
        f"{len(plan.prompts)} prompts to measure on, {len(calibration.held_out)} to verify on; "
        f"measurements are kept in {calibration.folder}"
    )
    curves = _measure(calibration, runs, tell)
    base, kept, trials = _choose(calibration, runs, curves, tell)
    density = _density(calibration, runs, curves, kept, tell)
    solutions = kept.at(curves, density)
    expected = {"density": kept.density_of(solutions), "error": _error(curves, solutions)}
    # Of the same shapes it is the same preset: no search has to find its settings once more.
    plain = solutions if kept.shapes == base.shapes else base.at(curves, expected["density"])
    expected["error_uniform"] = _error(curves, plain)
    tell(
        f"expected: density {expected['density']:.3f} of the sparse steps; attention errs by {expected['error']:.2%} "
        f"in a layer (geometric mean), in the base preset's shape by {expected['error_uniform']:.2%}"
    )
    presets = _presets(calibration, runs, solutions)
    for path, preset in zip(calibration.outputs, presets, strict=False):
        write(path, preset, f"density {expected['density']:.3f}, target {target}")
        tell(f"preset: {path}")
    verified = verify(calibration, runs, presets, _presets(calibration, runs, plain), tell)
    return {
        "status": "complete",
        "output": [str(path) for path in calibration.outputs],
        "target": str(target),
        "shape": next(row["shape"] for row in trials if row["kept"]),
        "trials": trials,
        "expected": expected,
        "verified": verified,
        "met": is_met(calibration, verified),
    }


def measured_steps(first: int, end: int, count: int) -> list[int]:
    """Steps spread evenly over `first` to `end - 1`: the middle of each of `count` equal stretches."""
    places = first + (np.arange(count) + 0.5) * (end - first) / count
    return sorted({int(place) for place in places})


def _measure(calibration: Calibration, runs: Runs, tell: Callable[[str], None]) -> Curves:
    """Measure each shape in each layer, by transformer; without layers that the base preset keeps dense."""
    plan = calibration.plan
    shapes = shapes_for(calibration.base, plan.model.num_layers)
    tell(f"{len(shapes)} shapes of attention to compare: {'; '.join(shapes)}")
    sparse = calibration.sparse_steps
    steps = measured_steps(sparse[0], sparse[-1] + 1, calibration.measured_steps)
    figures = runs.measure(calibration.measured, shapes, steps)
    curves = {which: curves_of(figures, shapes, names) for which, names in runs.layers().items()}
    for which, each in curves.items():
        if not each:
            tell(f"{which} did not run at a measured step, so it keeps the base preset; more: --measured-steps")
    return {which: each for which, each in curves.items() if each}


@dataclass(frozen=True)
class _Shaped:
    """Shapes, and the factor by which single calls overrate the density of whole videos."""

    shapes: Assignment
    offset: float

    def at(self, curves: Curves, density: float) -> Solutions:
        return _solve(curves, self.shapes, density * self.offset)

    def density_of(self, solutions: Solutions) -> float:
        return _mean_density(solutions) / self.offset


def _choose(
    calibration: Calibration, runs: Runs, curves: Curves, tell: Callable[[str], None]
) -> tuple[_Shaped, _Shaped, list[dict[str, Any]]]:
    """The base preset's shape, the shapes that make the best videos of the measured prompts, and a row for each trial.

    Errors of single calls only decide which shapes to try.
    """
    target = calibration.target
    density = target.value if target.kind == "density" else TRIED_DENSITY
    base, *others = candidates(curves, density)
    lowest, highest = _reach(curves, base.shapes)
    if not lowest <= density <= highest:
        if target.kind == "density":
            raise InputError(f"--density {density:g}: the base preset can have {lowest:.3f} to {highest:.3f} here")
        density = min(max(density, lowest), highest)

    def can_have_it(candidate: Candidate) -> bool:
        lowest, highest = _reach(curves, candidate.shapes)
        return lowest <= density <= highest

    aims: dict[str, float] = {}

    def run(candidate: Candidate) -> list[Result]:
        aims[candidate.name] = density
        for again in ("", " again"):
            solutions = _solve(curves, candidate.shapes, aims[candidate.name])
            presets = _presets(calibration, runs, solutions)
            results = runs.sparse(calibration.measured, presets, f"trying {candidate.name}{again}")
            offset = _mean_density(solutions) / float(np.mean([result["density"] for result in results]))
            if again or abs(offset - 1) <= FAR_OFF:
                break
            aims[candidate.name] = density * offset
        return results

    def shaped(trial: Trial) -> _Shaped:
        aim = aims[trial.candidate.name]
        offset = _mean_density(_solve(curves, trial.candidate.shapes, aim)) / trial.density
        return _Shaped(trial.candidate.shapes, offset if abs(offset - 1) > CLOSE_ENOUGH else 1.0)

    trials = try_out([base, *filter(can_have_it, others)], run)
    kept, rows = keep(trials)
    for row in rows:
        psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
        gain = "" if row["gain_interval_db"] is None else f", {row['gain_db']:+.2f} ± {row['gain_interval_db']:.2f} dB"
        tell(f"tried {row['shape']}: PSNR {psnr} at density {row['density']:.3f}{gain}")
    tell(f"kept: {kept.candidate.name}")
    for row, trial in zip(rows, trials, strict=True):
        row["kept"] = trial is kept
    return shaped(trials[0]), shaped(kept), rows


def _density(calibration: Calibration, runs: Runs, curves: Curves, kept: _Shaped, tell: Callable[[str], None]) -> float:
    """The density that the target asks for."""
    target, plan = calibration.target, calibration.plan
    lowest = _reach(curves, kept.shapes)[0] / kept.offset

    def presets_at(density: float) -> Presets:
        return _presets(calibration, runs, kept.at(curves, density))

    if target.kind == "density":
        return target.value
    if target.kind == "speedup":
        first = calibration.measured[: calibration.batch]
        shares = [max(lowest, share) for share in TIMED]
        trials = [runs.sparse(first, presets_at(share), f"timing density {share:g}")[0] for share in shares]
        dense = runs.timed_dense(first)[0]
        # Without a step that leaves anything out, a sparse step is a dense one.
        pairs = [(trial["density"], dense if trial["step"] is None else trial["step"]) for trial in trials]
        timed: dict[str, Any] = {"dense": dense, "sparse": pairs}
        dense_steps = calibration.dense_steps
        density = density_for_speedup(target.value, plan.steps, dense_steps, timed, lowest)
        shown = ", ".join(f"{step:.3g} s at density {share:.2f}" for share, step in pairs)
        tell(
            f"on this machine a dense step takes {dense:.3g} s, a sparse one {shown} (means of one run each); "
            f"{target} of denoising, {dense_steps} of {plan.steps} steps dense, needs density {density:.3f}"
        )
        return density

    def psnr_at(density: float) -> float:
        results = runs.sparse(calibration.measured, presets_at(density), f"trying {density:.3f}")
        psnr = mean_psnr([result["psnr"] for result in results])
        tell(f"density {density:.3f}: PSNR {psnr:.2f} dB")
        return psnr

    density, found = density_for_psnr(target.value, lowest, psnr_at)
    if max(psnr for _, psnr in found) < target.value:
        tell(f"{target} was not reached with dense_steps {calibration.base.dense_steps:g}: try a base preset with more")
    return density


def _solve(curves: Curves, shapes: Assignment, density: float) -> Solutions:
    return {which: solve(each, shapes[which], density) for which, each in curves.items()}


def _reach(curves: Curves, shapes: Assignment) -> tuple[float, float]:
    lowest, highest = zip(*(reach(each, shapes[which]) for which, each in curves.items()), strict=True)
    return max(lowest), min(highest)


def _mean_density(solutions: Solutions) -> float:
    return float(np.mean([each.density for each in solutions.values()]))


def _error(curves: Curves, solutions: Solutions) -> float:
    """Relative error of attention, geometric mean over the transformers' layers."""
    errors = [error(curves[which], each.shapes, each.density) for which, each in solutions.items()]
    return float(np.exp(np.mean(np.log(errors))))


def _presets(calibration: Calibration, runs: Runs, solutions: Solutions) -> Presets:
    """A preset for each transformer; the second is None if there is only one transformer."""
    base = calibration.base
    source = f"psa-calibrate, {calibration.target}, from {base.name}, on {calibration.plan.settings.model}"[:500]
    make = partial(make_preset, base, source=source)
    made = [
        make(solutions.get(which), num_layers=len(names), name=path.stem)
        for (which, names), path in zip(runs.layers().items(), calibration.outputs, strict=False)
    ]
    return made[0], made[1] if len(made) > 1 else None
