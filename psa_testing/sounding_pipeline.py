"""A tiny Wan that makes sound with its video, as pipelines with a vocoder do; for tests of what becomes of sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput

RATE = 16000


@dataclass
class _Output:
    frames: Any
    audio: torch.Tensor | None


class SoundingWan(WanPipeline):
    """Each video's sound is a click at every full second, left loud and right soft, and as long as it is told."""

    def __call__(self, *arguments: Any, frame_rate: float, **settings: Any) -> _Output:
        frames = super().__call__(*arguments, **settings).frames
        audio = clicks(frames.shape[1] / frame_rate * self.stretch)
        return _Output(frames, self.spoil(audio.expand(len(frames), -1, -1).to(torch.bfloat16)))


def clicks(seconds: float) -> torch.Tensor:
    """A click of 10 ms at every full second: float32 [2, samples]."""
    audio = torch.zeros(2, round(seconds * RATE))
    tone = torch.sin(torch.arange(RATE // 100) * (2 * np.pi * 1000 / RATE))
    for start in range(0, audio.shape[1] - len(tone), RATE):
        audio[:, start : start + len(tone)] = torch.tensor([[0.8], [0.4]]) * tone
    return audio


def sounding_kind() -> PipelineKind:
    """What the commands know of it."""
    sound = SoundOutput("vocoder.config.output_sampling_rate")
    return replace(PIPELINE_KINDS["WanPipeline"], sound=sound, frame_rate="frame_rate")


def give_sound(pipe: WanPipeline, stretch: float = 1.0, spoil: Any = lambda audio: audio) -> None:
    """Make a WanPipeline a `SoundingWan`; `stretch` makes its sound too long or too short, `spoil` changes it."""
    pipe.__class__ = SoundingWan
    vars(pipe)["vocoder"] = SimpleNamespace(config=SimpleNamespace(output_sampling_rate=RATE))
    vars(pipe)["stretch"], vars(pipe)["spoil"] = stretch, spoil
