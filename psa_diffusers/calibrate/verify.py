"""Whether a calibrated preset keeps its promise, on prompts that it was not made on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from psa_diffusers.calibrate.runs import Presets, Runs
from psa_diffusers.settings import Plan

if TYPE_CHECKING:
    from psa_diffusers.calibrate.run import Calibration


def verify(
    calibration: Calibration, runs: Runs, presets: Presets, plain: Presets, tell: Callable[[str], None]
) -> dict[str, Any]:
    """PSNR, density and speed on the prompts that were not measured on, beside one set of thresholds for all layers."""
    rows = []
    for prompt in calibration.held_out:
        dense = runs.dense(prompt)
        row = {"prompt": prompt, "dense_step": dense["step"]}
        row["calibrated"] = runs.sparse(prompt, presets, "verifying")
        row["uniform"] = runs.sparse(prompt, plain, "verifying, all layers alike")
        rows.append(row)
    summary: dict[str, Any] = {"prompts": rows}
    for name in ("calibrated", "uniform"):
        values = [row[name]["psnr"] for row in rows if row[name]["psnr"] is not None]
        summary[name] = {
            "psnr": float(np.mean(values)) if values else None,
            "density": float(np.mean([row[name]["density"] for row in rows])),
            "speedup": float(
                np.mean([_speedup(calibration.plan, row["dense_step"], row[name]["step"]) for row in rows])
            ),
        }
        shown = "equal" if summary[name]["psnr"] is None else f"{summary[name]['psnr']:.2f} dB"
        label = "calibrated" if name == "calibrated" else "all layers alike"
        tell(
            f"verified on {len(rows)} held-out prompts, {label}: PSNR {shown} at density "
            f"{summary[name]['density']:.3f}, denoising {summary[name]['speedup']:.2f}x as fast as dense"
        )
    summary["gain_db"] = _gain(rows)
    if summary["gain_db"] is not None and summary["gain_db"] < 0:
        tell(
            f"on these prompts the rules for single layers are {-summary['gain_db']:.2f} dB worse than one set of "
            "thresholds for all layers at about the same density: measure on more prompts, or scale the base preset"
        )
    return summary


def _gain(rows: list[dict[str, Any]]) -> float | None:
    """Mean PSNR of the calibrated preset above that of one set of thresholds; None if no pair can be compared."""
    pairs = [(row["calibrated"]["psnr"], row["uniform"]["psnr"]) for row in rows]
    known = [calibrated - plain for calibrated, plain in pairs if None not in (calibrated, plain)]
    return float(np.mean(known)) if known else None


def _speedup(plan: Plan, dense_step: float, sparse_step: float | None) -> float:
    """Times as fast as dense that denoising is, from the median steps of two runs."""
    steps, first = plan.settings.steps, plan.preset.dense_step_count(plan.settings.steps)
    sparse = dense_step if sparse_step is None else sparse_step
    return steps * dense_step / (first * dense_step + (steps - first) * sparse)


def is_met(calibration: Calibration, verified: dict[str, Any]) -> bool:
    """Whether the target holds on the held-out prompts; a density to a hundredth of the whole."""
    result, target = verified["calibrated"], calibration.target
    if target.kind == "psnr":
        return result["psnr"] is None or result["psnr"] >= target.value
    if target.kind == "speedup":
        return result["speedup"] >= target.value
    return abs(result["density"] - target.value) <= 0.01
