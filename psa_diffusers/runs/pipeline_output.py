"""Reads a pipeline's output: the videos, and their sound if the pipeline makes sound."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput
from psa_diffusers.report.sound import Sound

VIDEOS = "videos"  # as modular pipelines call them


def wanted_outputs(kind: PipelineKind) -> list[str]:
    """The names of the outputs to ask a modular pipeline for."""
    return [VIDEOS] if kind.sound is None else [VIDEOS, kind.sound.name]


def read_output(pipe: Any, kind: PipelineKind, output: Any) -> list[tuple[np.ndarray, Sound | None]]:
    """Each video, float32 [frames, height, width, 3] in [0, 1], with its sound."""
    take = output.get if kind.modular else partial(getattr, output)
    videos = [np.asarray(frames, np.float32) for frames in take(VIDEOS if kind.modular else "frames")]
    waveforms = None if kind.sound is None else take(kind.sound.name)
    if kind.sound is None or waveforms is None:  # a pipeline may have no vocoder
        return [(video, None) for video in videos]
    sounds = _sounds(pipe, kind.sound, waveforms)
    return list(zip(videos, sounds, strict=True))


def _sounds(pipe: Any, where: SoundOutput, waveforms: Any) -> list[Sound]:
    if hasattr(waveforms, "cpu"):
        waveforms = waveforms.float().cpu().numpy()
    rate = int(attrgetter(where.rate)(pipe))
    return [Sound(np.atleast_2d(np.asarray(samples, np.float32)), rate) for samples in waveforms]
