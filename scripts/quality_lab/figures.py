"""PSNR, SSIM and flicker of videos, and differences prompt by prompt."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from statistics import mean

import torch

from psa_diffusers.calibrate.intervals import half_interval

MIN_ERROR = 1e-10  # of a frame, so that one equal to its reference counts as 100 dB


def psnr(reference: torch.Tensor, video: torch.Tensor) -> list[float]:
    """Mean over frames of each video's PSNR in dB; both `[videos, frames, 3, height, width]` in 0..1."""
    error = (reference - video).square().mean((2, 3, 4)).double().clamp_min(MIN_ERROR)
    return [round(value, 4) for value in (-10 * error.log10()).mean(1).tolist()]


def ssim(reference: torch.Tensor, video: torch.Tensor) -> list[float | None]:
    """Mean over frames of each video's SSIM; empty where scikit-image is not installed."""
    if not _has_skimage():
        return []
    from psa_diffusers.report.metrics import psnr_and_ssim

    pairs = zip(reference, video, strict=True)
    frames = ([video.permute(0, 2, 3, 1).float().cpu().numpy() for video in pair] for pair in pairs)
    return [psnr_and_ssim(*pair)["ssim"]["mean"] for pair in frames]


def flicker(reference: torch.Tensor, video: torch.Tensor) -> list[float]:
    """Mean over frames of each video's flicker as `psa_diffusers.report.flicker` defines it, in grey levels of 255."""
    change = (video - reference).diff(dim=1).square().mean((2, 3, 4)).double().sqrt()
    return [round(255 * value, 4) for value in change.mean(1).tolist()]


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences, prompt by prompt, and half its 95 % interval."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    return round(mean(differences), 4), half_interval(differences)


@cache
def _has_skimage() -> bool:
    try:
        import skimage.metrics  # noqa: F401
    except ImportError:
        warnings.warn("no SSIM: scikit-image is not installed", stacklevel=3)
        return False
    return True
