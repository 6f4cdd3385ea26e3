"""Measures how far one video is from another, frame by frame, and finds what is plainly wrong with a video.

Frames are arrays [frames, height, width, 3], uint8 or float in [0, 1]. Figures are taken on frames in memory,
before any video coding.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.errors import how_to_install
from psa_diffusers.report.flicker import flicker
from psa_diffusers.report.vmaf import vmaf

MIN_SIDE = 11  # the SSIM window
BLACK = 2 / 255
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"


def compare_frames(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """PSNR, SSIM, flicker and, if they are available, LPIPS and VMAF of `other` against `reference`, as JSON values.

    Returns:
        psnr (dB) and ssim: mean, worst and per_frame. A frame equal to its reference has no finite PSNR: it is None in
        per_frame, counted in identical_frames and left out of the mean (None if all are equal). A frame that is not
        finite has None for both. SSIM is Wang et al.'s (11 x 11 Gaussian window); None for frames smaller than that.
        flicker: as `flicker` says.
        lpips, vmaf: mean and per_frame, or None and the reason.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(f"the two videos differ in shape: {reference.shape} and {other.shape}")
    return {
        **psnr_and_ssim(reference, other),
        "flicker": flicker(reference, other),
        "lpips": lpips(reference, other),
        "vmaf": vmaf(reference, other),
    }


def psnr_and_ssim(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The part of `compare_frames` that needs neither a network nor a program; for equal shapes."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        pairs = list(pool.map(_frame_figures, reference, other))
    psnr, ssim, same = zip(*pairs, strict=True)
    return {"psnr": {**_summary(psnr), "identical_frames": sum(same)}, "ssim": _summary(ssim)}


def lpips(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """LPIPS (AlexNet) of every frame, if the package and its weights are installed; nothing is ever downloaded."""
    missing = _lpips_missing()
    if missing:
        return {"mean": None, "per_frame": None, "reason": missing}
    import lpips as package
    import torch

    model = package.LPIPS(net="alex", verbose=False).eval()
    values = []
    with torch.no_grad():
        for first, second in zip(reference, other, strict=True):
            pair = [torch.from_numpy(_unit(frame)).permute(2, 0, 1)[None] * 2 - 1 for frame in (first, second)]
            values.append(float(model(*pair)))
    return {"mean": float(np.mean(values)), "per_frame": values, "reason": None}


def frame_faults(frames: np.ndarray) -> list[str]:
    """What is broken, one line each: frames that are not finite, all black, or all of one colour."""
    faults = []
    finite = np.isfinite(frames).all(axis=(1, 2, 3)) if frames.dtype != np.uint8 else np.ones(len(frames), bool)
    if not finite.all():
        faults.append(f"{int((~finite).sum())} of {len(frames)} frames hold values that are not finite")
    shown = [_unit(frame) for frame in frames[finite]]
    black = sum(frame.max() <= BLACK for frame in shown)
    if black:
        faults.append(f"{black} of {len(frames)} frames are all black")
    flat = sum(frame.max() > BLACK and np.ptp(frame.reshape(-1, 3), axis=0).max() <= BLACK for frame in shown)
    if flat:
        faults.append(f"{flat} of {len(frames)} frames are one single colour")
    return faults


def _frame_figures(reference: np.ndarray, other: np.ndarray) -> tuple[float | None, float | None, bool]:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    first, second = _unit(reference), _unit(other)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None, None, False
    same = bool(np.array_equal(first, second))
    psnr = None if same else float(peak_signal_noise_ratio(first, second, data_range=1.0))
    if min(first.shape[:2]) < MIN_SIDE:
        return psnr, None, same
    ssim = structural_similarity(
        first, second, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return psnr, min(1.0, float(ssim)), same  # float32 rounding may pass 1


def _summary(values: tuple[float | None, ...]) -> dict[str, Any]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "worst": min(known) if known else None,
        "per_frame": list(values),
    }


def _unit(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float32) / 255 if frame.dtype == np.uint8 else frame.astype(np.float32, copy=False)


def _lpips_missing() -> str | None:
    try:
        import lpips as package  # noqa: F401
        import torch
    except ImportError:
        return f"the package lpips is not installed; {how_to_install('lpips')}"
    weights = Path(torch.hub.get_dir(), "checkpoints", LPIPS_WEIGHTS)
    return None if weights.is_file() else f"its AlexNet weights are not on this machine ({weights})"
