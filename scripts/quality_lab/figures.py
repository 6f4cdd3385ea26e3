"""PSNR and SSIM of videos, and intervals of means over prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, mean, stdev

import torch

LEAST_ERROR = 1e-10  # of a frame, so that one equal to its reference counts as 100 dB
FEWEST = 4  # values that an interval takes


def psnr(reference: torch.Tensor, video: torch.Tensor) -> list[float]:
    """Mean over frames of each video's PSNR in dB; both `[videos, frames, 3, height, width]` in 0..1."""
    error = (reference - video).square().mean((2, 3, 4)).double().clamp_min(LEAST_ERROR)
    return [round(value, 4) for value in (-10 * error.log10()).mean(1).tolist()]


def ssim(reference: torch.Tensor, video: torch.Tensor) -> list[float | None]:
    """Mean over frames of each video's SSIM; empty where scikit-image is not installed."""
    if not _has_skimage():
        return []
    from psa_diffusers.metrics import psnr_and_ssim

    pairs = zip(reference, video, strict=True)
    frames = ([video.permute(0, 2, 3, 1).float().cpu().numpy() for video in pair] for pair in pairs)
    return [psnr_and_ssim(*pair)["ssim"]["mean"] for pair in frames]


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None for fewer than four values."""
    if len(values) < FEWEST:
        return None
    return round(_student(len(values) - 1) * stdev(values) / len(values) ** 0.5, 4)


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the differences, prompt by prompt, and half its 95 % interval."""
    differences = [value - base for value, base in zip(values, baseline, strict=True)]
    return round(mean(differences), 4), half_interval(differences)


def _student(freedom: int) -> float:
    """The 97.5 % quantile, by the expansion of Abramowitz and Stegun, 26.7.5: within 1 % from 3 degrees of freedom."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


@cache
def _has_skimage() -> bool:
    try:
        import skimage.metrics  # noqa: F401
    except ImportError:
        warnings.warn("no SSIM: scikit-image is not installed", stacklevel=3)
        return False
    return True
