"""What a pipeline's call gave: the videos, and their sound where it makes sound."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np

from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput
from psa_diffusers.report.sound import Sound


def read_output(pipe: Any, kind: PipelineKind, output: Any) -> list[tuple[np.ndarray, Sound | None]]:
    """Each video, float32 [frames, height, width, 3] in [0, 1], with its sound."""
    videos = [np.asarray(frames, np.float32) for frames in output.frames]
    waveforms = None if kind.sound is None else getattr(output, kind.sound.name)
    if kind.sound is None or waveforms is None:  # a pipeline may have no vocoder
        return [(video, None) for video in videos]
    sounds = _sounds(pipe, kind.sound, waveforms)
    return list(zip(videos, sounds, strict=True))


def _sounds(pipe: Any, where: SoundOutput, waveforms: Any) -> list[Sound]:
    if hasattr(waveforms, "cpu"):
        waveforms = waveforms.float().cpu().numpy()
    rate = int(attrgetter(where.rate)(pipe))
    return [Sound(np.atleast_2d(np.asarray(samples, np.float32)), rate) for samples in waveforms]
