"""Verifies a calibrated preset on prompts that were not used to make it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psa_diffusers.calibrate.intervals import FEWEST, half_interval
from psa_diffusers.calibrate.plan import Calibration
from psa_diffusers.calibrate.runner import Presets, Runs


def verify(
    calibration: Calibration, runs: Runs, presets: Presets, plain: Presets, tell: Callable[[str], None]
) -> dict[str, Any]:
    """PSNR, density and speed on the held-out prompts, of the calibrated preset and of the base preset's shape.

    `gain_db` is how far the PSNR is above the base preset's, a mean over the videos, and `gain_interval_db` half the
    95 % interval of that. Each is None if it cannot be computed, and the interval also where both presets are the same.
    """
    videos = calibration.verified
    columns = zip(
        videos,
        runs.dense(videos),
        runs.sparse(videos, presets, "verifying"),
        runs.sparse(videos, plain, "verifying, the base preset"),
        strict=True,
    )
    rows = [
        {**video._asdict(), "dense_step": dense["step"], "calibrated": calibrated, "uniform": alike}
        for video, dense, calibrated, alike in columns
    ]
    summary: dict[str, Any] = {"prompts": rows}
    same = presets == plain
    for name in ("calibrated", "uniform"):
        values = [row[name]["psnr"] for row in rows if row[name]["psnr"] is not None]
        summary[name] = {
            "psnr": float(np.mean(values)) if values else None,
            "density": float(np.mean([row[name]["density"] for row in rows])),
            "speedup": float(np.mean([_speedup(calibration, row["dense_step"], row[name]["step"]) for row in rows])),
        }
        if same and name == "uniform":
            continue
        shown = "equal" if summary[name]["psnr"] is None else f"{summary[name]['psnr']:.2f} dB"
        label = "calibrated" if name == "calibrated" else "the base preset at equal density"
        tell(
            f"verified on {len(rows)} held-out prompts, {label}: PSNR {shown} at density "
            f"{summary[name]['density']:.3f}, denoising {summary[name]['speedup']:.2f}x as fast as dense"
        )
    gains = _gains(rows)
    summary["gain_db"] = float(np.mean(gains)) if gains else None
    summary["gain_interval_db"] = None if same else half_interval(gains)
    if same:
        tell("the base preset's shape is kept, so there is no gain over it to tell")
    elif gains:
        tell(_verdict(summary["gain_db"], summary["gain_interval_db"]))
    return summary


def _gains(rows: list[dict[str, Any]]) -> list[float]:
    """The calibrated preset's PSNR minus the base preset's, for each video where both have one."""
    pairs = [(row["calibrated"]["psnr"], row["uniform"]["psnr"]) for row in rows]
    return [calibrated - alike for calibrated, alike in pairs if None not in (calibrated, alike)]


def _verdict(gain: float, interval: float | None) -> str:
    """The result of the verification in words, with how sure it is."""
    better = f"{abs(gain):.2f} dB {'worse' if gain < 0 else 'better'} than the base preset"
    found = f"on these prompts the calibrated preset is {better} at equal density"
    if interval is None:
        return f"{found}; too few prompts to tell how sure that is: hold out {FEWEST} or more"
    return f"{found}, 95 % interval {gain - interval:+.2f} to {gain + interval:+.2f} dB" + (
        "; hold out more prompts to tell the sign" if abs(gain) <= interval else ""
    )


def _speedup(calibration: Calibration, dense_step: float, sparse_step: float | None) -> float:
    """How many times as fast as dense the denoising is, from the mean steps of two runs."""
    steps, dense = calibration.plan.steps, calibration.dense_steps
    sparse = dense_step if sparse_step is None else sparse_step
    return steps * dense_step / (dense * dense_step + (steps - dense) * sparse)


def is_met(calibration: Calibration, verified: dict[str, Any]) -> bool:
    """Whether the target is met on the held-out prompts; a density is met within 0.01."""
    result, target = verified["calibrated"], calibration.target
    if target.kind == "psnr":
        return result["psnr"] is None or result["psnr"] >= target.value
    if target.kind == "speedup":
        return result["speedup"] >= target.value
    return abs(result["density"] - target.value) <= 0.01
