"""A calibration from end to end: measure, solve, try, write the preset, verify it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from psa_diffusers import stopping
from psa_diffusers.calibrate.capture import Figures, curves_of
from psa_diffusers.calibrate.preset_file import write
from psa_diffusers.calibrate.runs import Presets, Runs
from psa_diffusers.calibrate.scaling import SCALES, known_density, scaled_preset, scaled_spec
from psa_diffusers.calibrate.solve import Curve, Solution, drawn_together, judged, reachable, spread, uniform
from psa_diffusers.calibrate.store import Store
from psa_diffusers.calibrate.targets import density_for_psnr, density_for_speedup
from psa_diffusers.calibrate.task import Calibration, check
from psa_diffusers.calibrate.verify import is_met, verify
from psa_diffusers.errors import InputError
from psa_diffusers.settings import Plan
from psa_kernels import AttentionSpec

Curves = dict[str, dict[int, Curve]]
# Per video the settings that PSNR and measurements depend on; names and files do not count.
UNIMPORTANT = ("preset", "compare", "strict", "samples", "model")
TIMED = (0.12, 0.4)
# How far to follow the errors of single layers; 0 treats all alike. Ties go to the first.
STRENGTHS = (0.0, 0.3, 0.6, 1.0)
TRIED_DENSITY = 0.25  # at which they are tried where the target is another


@stopping.carried_out()
def calibrate(calibration: Calibration, tell: Callable[[str], None]) -> dict[str, Any]:
    """Carries a calibration out, continuing one that was stopped; returns the summary.

    Args:
        tell: called with each line of progress.

    Raises:
        InputError: as `check`; or the measurements there are of other settings; or a speed is out of reach.
        PSAFallbackError: attention would be dense, for the reason that it says.
    """
    check(calibration)
    plan, target = calibration.plan, calibration.target
    settings = {name: value for name, value in plan.settings.to_dict().items() if name not in UNIMPORTANT}
    store = Store(calibration.folder, {**settings, "batch": calibration.batch}, calibration.overwrite)
    runs = Runs(plan, store, tell, calibration.batch)
    tell(
        f"{len(plan.prompts)} prompts to measure on, {len(calibration.held_out)} to verify on; "
        f"measurements are kept in {calibration.folder}"
    )
    steps = measured_steps(plan, calibration.measured_steps)
    figures = runs.measure(calibration.measured, steps)
    curves = _curves(plan, figures, runs.layers(), tell)
    strength = _strength(calibration, runs, curves, tell)
    drawn = _drawn(curves, strength)
    density = _density(calibration, runs, drawn, tell)
    solutions = {which: judged(curves[which], spread(each, density)) for which, each in drawn.items()}
    plain = {which: uniform(each, solutions[which].density) for which, each in curves.items()}
    expected = _expectation(solutions, plain)
    tell(
        f"expected: density {expected['density']:.3f} of the sparse steps; the model's output at a step changes by "
        f"{expected['error']:.2%}, with the same thresholds in all layers by {expected['error_uniform']:.2%}"
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
        "strength": strength,
        "expected": expected,
        "verified": verified,
        "met": is_met(calibration, verified),
    }


def measured_steps(plan: Plan, count: int) -> list[int]:
    """Denoising steps, counted from 0, spread evenly over the sparse ones: the middle of each of `count` stretches."""
    first, steps = plan.preset.dense_step_count(plan.settings.steps), plan.settings.steps
    places = first + (np.arange(count) + 0.5) * (steps - first) / count
    return sorted({int(place) for place in places})


def _curves(plan: Plan, figures: list[Figures], layers: dict[str, list[str]], tell: Callable[[str], None]) -> Curves:
    """What was measured, by transformer and number of the layer, without layers that the base preset keeps dense."""
    measured = curves_of(figures)
    specs = plan.preset.layer_specs(plan.model.num_layers)
    blocks = {name: int(row["blocks"][0]) for each in figures for name, row in each.items()}

    def curve(name: str, spec: AttentionSpec) -> Curve:
        return Curve(SCALES, *measured[name], lambda scale: known_density(scaled_spec(spec, scale), blocks[name]))

    curves = {
        which: {index: curve(name, specs[index]) for index, name in enumerate(names) if name in measured}
        for which, names in layers.items()
    }
    for which, each in curves.items():
        if not each:
            tell(f"{which} did not run at a measured step, so it keeps the base preset; more: --measured-steps")
    return {which: each for which, each in curves.items() if each}


def _drawn(curves: Curves, strength: float) -> Curves:
    return {which: drawn_together(each, strength) for which, each in curves.items()}


def _strength(calibration: Calibration, runs: Runs, curves: Curves, tell: Callable[[str], None]) -> float:
    """How far to follow what was measured of single layers: whatever makes the best of the videos to measure on.

    Errors of single steps say only roughly what becomes of a video, so that following them all the way can do harm.
    """
    if len(STRENGTHS) == 1:
        return STRENGTHS[0]
    target = calibration.target
    wanted = target.value if target.kind == "density" else TRIED_DENSITY
    density = max(wanted, *(reachable(each) for each in curves.values()))
    psnrs = {}
    for strength in STRENGTHS:
        solutions = {which: spread(each, density) for which, each in _drawn(curves, strength).items()}
        presets = _presets(calibration, runs, solutions)
        psnrs[strength] = _mean_psnr(runs.sparse(calibration.measured, presets, f"trying strength {strength:g}"))
    found = ", ".join(f"{psnr:.2f} dB at strength {strength:g}" for strength, psnr in psnrs.items())
    best = max(psnrs, key=psnrs.get)
    tell(f"rules for single layers, density {density:.3f}: {found} (0: all layers alike); strength {best:g} it is")
    return best


def _mean_psnr(results: list[dict[str, Any]]) -> float:
    """In dB, over the videos that differ from the dense ones; infinite if none does."""
    values = [result["psnr"] for result in results if result["psnr"] is not None]
    return float(np.mean(values)) if values else math.inf


def _density(calibration: Calibration, runs: Runs, curves: Curves, tell: Callable[[str], None]) -> float:
    """The mean density of the layers that the target asks for."""
    target, plan = calibration.target, calibration.plan
    lowest = max(reachable(each) for each in curves.values())

    def presets_at(density: float) -> Presets:
        return _presets(calibration, runs, {which: spread(each, density) for which, each in curves.items()})

    if target.kind == "density":
        if target.value < lowest:
            raise InputError(f"--density {target.value:g}: the lowest that was measured is {lowest:.3f}")
        return target.value
    if target.kind == "speedup":
        first = calibration.measured[: calibration.batch]
        shares = [max(lowest, share) for share in TIMED]
        trials = [runs.sparse(first, presets_at(share), f"timing density {share:g}")[0] for share in shares]
        dense = runs.timed_dense(first)[0]
        timed = {"dense": dense, "sparse": [(trial["density"], trial["step"]) for trial in trials]}
        dense_steps = plan.preset.dense_step_count(plan.settings.steps)
        density = density_for_speedup(target.value, plan.settings.steps, dense_steps, timed, lowest)
        pairs = ", ".join(f"{step:.3g} s at density {share:.2f}" for share, step in timed["sparse"])
        tell(
            f"on this machine a dense step takes {dense:.3g} s, a sparse one {pairs} (medians of one run each); "
            f"{target} of denoising, {dense_steps} of {plan.settings.steps} steps dense, needs density {density:.3f}"
        )
        return density

    def psnr_at(density: float) -> float:
        results = runs.sparse(calibration.measured, presets_at(density), f"trying {density:.3f}")
        psnr = _mean_psnr(results)
        tell(f"density {density:.3f}: PSNR {psnr:.2f} dB")
        return psnr

    density, tried = density_for_psnr(target.value, lowest, psnr_at)
    if max(psnr for _, psnr in tried) < target.value:
        tell(f"{target} was not reached with dense_steps {plan.preset.dense_steps:g}: try a base preset with more")
    return density


def _expectation(solutions: dict[str, Solution], plain: dict[str, Solution]) -> dict[str, float]:
    return {
        "density": float(np.mean([each.density for each in solutions.values()])),
        "error": math.sqrt(np.mean([each.error for each in solutions.values()])),
        "density_uniform": float(np.mean([each.density for each in plain.values()])),
        "error_uniform": math.sqrt(np.mean([each.error for each in plain.values()])),
    }


def _presets(calibration: Calibration, runs: Runs, solutions: dict[str, Solution]) -> Presets:
    """A preset for each transformer; the second is None where there is one."""
    base, layers = calibration.plan.preset, runs.layers()
    source = f"psa-calibrate, {calibration.target}, from {base.name}, on {calibration.plan.settings.model}"[:500]
    made = [
        scaled_preset(base, solutions[which].scales if which in solutions else {}, len(names), path.stem, source)
        for (which, names), path in zip(layers.items(), calibration.outputs, strict=False)
    ]
    return made[0], made[1] if len(made) > 1 else None
