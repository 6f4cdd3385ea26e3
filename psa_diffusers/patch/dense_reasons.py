"""Which calls stay dense: as the preset says, in silence; against it, noted with the reason and told once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping

import torch

from psa_diffusers.patch.graph_ops import NO_STEP, Layer
from psa_diffusers.patch.stats import RunRecorder
from psa_diffusers.patch.step import DenoisingStep, DenoisingTracker
from psa_diffusers.presets import Preset


class PSAFallbackWarning(UserWarning):
    """Calls run dense although the preset asked for sparse attention."""


class PSAFallbackError(RuntimeError):
    """With `strict=True`: a call would have run dense although the preset asked for sparse attention."""


class Fallbacks:
    """What is dense in the current run, and why if the preset wants it sparse.

    Args:
        presets: by the name of the transformer.
        tracker, recorder: of the processor.
        strict: raise `PSAFallbackError` instead of warning.
    """

    def __init__(
        self, presets: Mapping[str, Preset], tracker: DenoisingTracker, recorder: RunRecorder, strict: bool
    ) -> None:
        self._presets, self._tracker, self._recorder, self._strict = presets, tracker, recorder, strict
        self._dense_steps: dict[str, int] = {}
        self._warned: set[str] = set()

    def foresee(self, layer: Layer, obstacle: str | None) -> tuple[bool, str | None]:
        """Whether a layer can be sparse in this forward, and if it cannot although the preset wants it, why.

        Args:
            obstacle: why no layer can be sparse in this forward.
        """
        at = self._tracker.current
        if at is None:
            return False, NO_STEP
        self._begin_run(at)
        if not self._wants_sparse(layer, at):
            return False, None
        reason = obstacle or _obstacle(layer, at)
        return reason is None, reason

    def note(self, layer: Layer, reason: str | None) -> None:
        """Note a dense call of a layer, and why it is dense if the preset wants it sparse."""
        at = self._tracker.current
        if at is not None:
            self._recorder.add_dense(at.step, layer.name, reason)
        if reason is not None:
            self.refuse(reason)

    def note_unreached(self, layers: Iterable[Layer], reason: str) -> None:
        """Note layers that are dense because the processor is not in its place."""
        at = self._tracker.current
        if at is not None:
            for layer in layers:
                self._recorder.add_dense(at.step, layer.name, reason if self._wants_sparse(layer, at) else None)
        self.refuse(reason)

    def refuse(self, reason: str) -> None:
        """Warn of a reason, once.

        Raises:
            PSAFallbackError: instead of the warning, with `strict`.
        """
        if self._strict:
            raise PSAFallbackError(f"strict: attention would be dense: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"attention is dense: {reason}", PSAFallbackWarning, stacklevel=4)

    def _begin_run(self, at: DenoisingStep) -> None:
        """Forget the last run, if this step is of another one."""
        if at.run != self._recorder.run:
            self._dense_steps = {name: preset.dense_step_count(at.steps) for name, preset in self._presets.items()}
            self._recorder.start(at.run, at.steps, min(self._dense_steps.values()))

    def _wants_sparse(self, layer: Layer, at: DenoisingStep) -> bool:
        """Whether the preset wants this layer sparse at this step."""
        return layer.spec is not None and at.step >= self._dense_steps[layer.transformer]


def _obstacle(layer: Layer, at: DenoisingStep) -> str | None:
    """Why a layer that the preset wants sparse cannot be so, as far as is known before the forward."""
    if at.grid is None:
        return "this pipeline does not tell the transformer the video's frames, height and width"
    if (video := math.prod(at.grid)) < layer.preset.min_tokens:
        return f"the sequence of {video} tokens is shorter than min_tokens={layer.preset.min_tokens}"
    if torch.is_grad_enabled():
        return "gradients are enabled, and sparse attention is for inference only"
    return None
