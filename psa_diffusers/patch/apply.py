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
from psa_presets import Preset


class PSAHandle:
    """A pipeline that is patched with a processor; as a context manager it undoes the patch at the end of the block.

    Then the pipeline is as it was before: if it had another patch, it has that again.
    """

    def __init__(self, processor: PSAProcessor) -> None:
        self.processor = processor
        self._replaced = processor.install()

    def stats(self) -> RunStats:
        """Return the statistics of the pipeline's last run; waits for the device."""
        return self.processor.stats()

    def run(self, timesteps: torch.Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """As `PSAProcessor.run`: say which timesteps a denoising loop of your own goes through."""
        return self.processor.run(timesteps)

    def step(
        self, index: int, *, branch: int = 0, text_tokens: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """As `PSAProcessor.step`, for forwards that are captured into CUDA graphs."""
        return self.processor.step(index, branch=branch, text_tokens=text_tokens)

    def restore(self) -> None:
        """Give the pipeline its own attention processors back."""
        self.processor.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.processor.give_back()


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

    Args:
        pipe: a diffusers pipeline of a supported model.
        preset: name of a shipped preset, path of a YAML file, or a `Preset`; by default `psa-3`, or `psa-auto` where a
            density is given.
        preset_2: the same for `transformer_2` of pipelines with two experts; by default `preset`.
        density: what attention may cost in sparse layers, as a share of dense attention, above 0 and up to 1.
        strict: raise instead of falling back to dense attention.

    Returns:
        A handle that has the statistics of runs and undoes the patch; a `with` block undoes it at its end.

    Raises:
        UnsupportedModelError: the pipeline's transformer is of no supported family.
        PresetError: a preset cannot be read, cannot have the density, or names layers that the transformer lacks.
        ValueError: `preset_2` is given, but the pipeline has one transformer.
        PSAFallbackError: with `strict`, if a layer that the preset wants sparse has a processor that PSA does not know.
    """
    processor = PSAProcessor(pipe, preset, preset_2=preset_2, density=density, strict=strict)
    return PSAHandle(processor)
