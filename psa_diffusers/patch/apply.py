"""apply_psa: patch a whole pipeline in one call, and undo it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.patch.stats import RunStats
from psa_diffusers.presets import Preset


class PSAHandle:
    """A patched pipeline; as a context manager it undoes the patch at the end of the block."""

    def __init__(self, processor: PSAProcessor) -> None:
        self.processor = processor

    def stats(self) -> RunStats:
        """What the pipeline's last run attended; waits for the device."""
        return self.processor.stats()

    def run(self, timesteps: torch.Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """As `PSAProcessor.run`, for denoising loops by hand."""
        return self.processor.run(timesteps)

    def restore(self) -> None:
        """Give the pipeline its own attention processors back."""
        self.processor.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def apply_psa(
    pipe: Any,
    preset: str | Path | Preset | None = None,
    *,
    preset_2: str | Path | Preset | None = None,
    density: float | None = None,
    strict: bool = False,
) -> PSAHandle:
    """Make the video self-attention of all the pipeline's transformers sparse.

    Examples:
        >>> with apply_psa(pipe, "psa-3") as psa:
        ...     video = pipe("a cat playing the piano").frames[0]
        >>> psa.stats().density_sparse

    Arguments and errors are those of `PSAProcessor`; with `strict` also `PSAFallbackError`, where a layer that the
    preset wants sparse has a processor of another's.
    """
    processor = PSAProcessor(pipe, preset, preset_2=preset_2, density=density, strict=strict)
    processor.install()
    return PSAHandle(processor)
