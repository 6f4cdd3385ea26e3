"""Never a black video: sparse attention that gives values that are not finite is computed again, dense.

A residual stream never loses a NaN or an infinity, so the output of a transformer tells of all its attentions. A look
at it, a few megabytes and one wait for the device a forward, is all that a sound run pays. If that output is not
finite, the forward is computed once more, now with a look at each sparse attention and dense attention in place of
those that are at fault, and so are the forwards of the rest of the run.

A forward cannot be computed twice where something keeps values from one forward to the next, as caches of whole blocks
do, or where other processes take part in it. Each sparse attention is looked at there from the start.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from psa_diffusers.diffusers_internals import keeps_state_between_forwards
from psa_diffusers.patch.stats import RunRecorder
from psa_diffusers.patch.step import DenoisingStep, DenoisingTracker

REASON = "its sparse output held values that are not finite, so that it was computed again"


class FiniteGuard:
    """Watches the forwards of the patched transformers.

    Attributes:
        looks_closer: whether each sparse attention of the current forward is to be looked at; if it is not finite,
            `blame_sparse` or `blame_model` is to be told.

    Args:
        tracker, recorder: of the processor.
        forget: drops what was kept of the current denoising step for later ones.
        refuse: warns of a fallback, or raises where there may be none.
    """

    def __init__(
        self,
        tracker: DenoisingTracker,
        recorder: RunRecorder,
        forget: Callable[[DenoisingStep], None],
        refuse: Callable[[str], None],
        strict: bool,
    ) -> None:
        self._tracker, self._recorder, self._forget, self._refuse = tracker, recorder, forget, refuse
        self._strict = strict
        self._run = 0
        self._seen: set[int] = set()
        self._given_up = False
        self._told: set[str] = set()
        self.looks_closer = False

    def before_forward(self, transformer: torch.nn.Module, shared: bool) -> None:
        """Begin a forward; `shared` says that other processes take part in it."""
        at = self._tracker.current
        if at is None:
            return
        if at.run != self._run:
            self._run, self._given_up, self.looks_closer = at.run, False, False
            self._told.clear()
            self._seen.clear()
        if id(transformer) not in self._seen:  # once a run: all its modules are asked
            self._seen.add(id(transformer))
            closer = shared or keeps_state_between_forwards(transformer)
            self.looks_closer = not self._given_up and (self.looks_closer or closer)
        self._recorder.begin_forward()

    @torch.compiler.disable
    def after_forward(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: gives the output of the forward that was computed again, or None to keep the first one."""
        at = self._tracker.current
        if at is None or self._given_up or not self._recorder.was_sparse or _is_finite(output):
            return None
        again = None
        if not self.looks_closer:
            self.looks_closer = True
            self._recorder.undo_forward()
            self._forget(at)
            again = output = transformer.forward(*args, **kwargs)
        if not self._given_up and not _is_finite(output):
            self.blame_model(None, at)
        return again

    def blame_sparse(self, layer: str, at: DenoisingStep) -> None:
        """Note that a sparse attention was not finite where dense attention is."""
        self._recorder.add_not_finite(at.step, layer)
        if layer not in self._told:
            self._told.add(layer)
            self._refuse(f"{layer} at step {at.step + 1} of {at.steps}: {REASON}")

    def blame_model(self, layer: str | None, at: DenoisingStep) -> None:
        """Note that dense attention is not finite either; nothing is computed again in the rest of the run."""
        self._given_up, self.looks_closer = True, False
        place = "the transformer's output" if layer is None else f"the attention of {layer}"
        message = (
            f"{place} at step {at.step + 1} of {at.steps} is not finite with dense attention either: the model itself "
            "made values that are not finite (its dtype, weights or inputs), so the video will be spoiled"
        )
        self._recorder.model_not_finite = message
        if self._strict:
            raise FloatingPointError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; waits for the device.

    The largest magnitude tells, in one pass and without a mask of the tensor's size.
    """
    return all(bool(torch.linalg.vector_norm(x, float("inf")).isfinite()) for x in tensors if x.numel())


def _is_finite(output: Any) -> bool:
    return all_finite(*_tensors(output))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """What a transformer gives: a tensor, a tuple or list of them, or a mapping, as diffusers' output classes are."""
    if torch.is_tensor(output):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
