"""Flicker: how much one video's changes from frame to frame differ from another's."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

GREY_LEVELS = 255


def flicker(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """How differently successive frames change in two videos, which PSNR and SSIM, frame by frame, do not see.

    For each frame after the first it is the root mean square, over pixels and colours, of
    `(other[t] - other[t - 1]) - (reference[t] - reference[t - 1])`: dtSSD of Erofeev et al., "Perceptually Motivated
    Benchmark for Video Matting" (BMVC 2015), of colours and with the mean over pixels instead of the sum. An error that
    stays the same from frame to frame does not count; one that comes and goes counts in full.

    Args:
        reference, other: [frames, height, width, 3], of one shape, uint8 or float in [0, 1].

    Returns:
        Figures in grey levels of 255, as JSON values. mean, worst (the largest) and per_frame: 0 where both videos
        change alike; None for the first frame, and for a frame that is not finite or follows such a one.
        change: the mean absolute difference of each video's own successive frames, under reference and other, and the
        ratio of the second to the first, None where the reference does not change. A ratio above 1 is a video that
        changes more than its reference, one below 1 is stiller. All of them are None where no frame has a figure.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(_changes, reference[:-1], reference[1:], other[:-1], other[1:]))
    known = [figures for figures in found if figures is not None]
    per_frame = [None] * min(1, len(reference)) + [None if figures is None else figures[0] for figures in found]
    if not known:
        nothing = {"reference": None, "other": None, "ratio": None}
        return {"mean": None, "worst": None, "per_frame": per_frame, "change": nothing}
    mean, before, after = (float(np.mean(values)) for values in zip(*known, strict=True))
    change = {"reference": before, "other": after, "ratio": after / before if before else None}
    return {"mean": mean, "worst": max(figures[0] for figures in known), "per_frame": per_frame, "change": change}


def _changes(*frames: np.ndarray) -> tuple[float, float, float] | None:
    """The flicker of one frame and what each video changes by, of a frame and the next of both videos."""
    if not all(np.isfinite(frame).all() for frame in frames):
        return None
    earlier, later, other_earlier, other_later = (_grey_levels(frame) for frame in frames)
    change, other_change = later - earlier, other_later - other_earlier
    return (
        math.sqrt(np.square(other_change - change).mean(dtype=np.float64)),
        float(np.abs(change).mean(dtype=np.float64)),
        float(np.abs(other_change).mean(dtype=np.float64)),
    )


def _grey_levels(frame: np.ndarray) -> np.ndarray:
    return frame.astype(np.float32) * (1 if frame.dtype == np.uint8 else GREY_LEVELS)
