"""Never a black video: sparse attention whose output is not finite is computed again, dense.

A residual stream never loses a NaN or an infinity, so the output of a transformer shows whether any attention made one.
Checking it (a few megabytes, and one wait for the device a forward) is all that a sound run pays. If the output is not
finite, the forward is computed once more. Now the output of each sparse attention is checked, and dense attention
replaces those that are not finite. The remaining forwards of the run are checked in the same way.

Ranks that share a forward agree on that, so that all of them compute it again or none does.

Forwards that are replayed as CUDA graphs are looked at when somebody asks, because to wait for each would take more
time than replays gain. Whoever replays them asks at the end, and has everything computed again if it has to be.

A forward cannot be computed twice if something keeps values from one forward to the next, as caches of whole blocks do.
There each sparse attention is checked from the start.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from psa_diffusers.patch.dense_reasons import Fallbacks
from psa_diffusers.patch.run import Forward

COMPUTED_AGAIN = "its sparse output held values that are not finite, so that it was computed again"
FULL_COMPUTED_AGAIN = "its dense output by PSA's kernel held values that are not finite, so that it was computed again"


class FiniteGuard:
    """Notes in a run what was not finite, and warns of it; with `strict` it raises instead.

    Attributes:
        at_once: whether every output must be looked at before it is used, so that no forward can be replayed.
    """

    def __init__(self, fallbacks: Fallbacks, strict: bool) -> None:
        self._fallbacks, self._strict = fallbacks, strict
        self.at_once = False
        # Of outputs that nobody has looked at yet the largest magnitudes.
        self._unseen: list[torch.Tensor] = []

    def is_spoiled(self, forward: Forward, output: Any) -> bool:
        """Whether a transformer's output is not finite, and the operator's attention may be the cause.

        On ranks that share the forward all answers are the same.
        """
        if forward.share is not None:
            return self._is_spoiled_on_any(forward, output)
        if forward.run.model_not_finite or not any(note.stats or note.full_by for note in forward.notes):
            return False
        if forward.replayed:
            self._unseen += [_largest(x) for x in _tensors(output) if x.numel()]
            return False
        return not is_finite(output)

    def replays_were_finite(self) -> bool:
        """Whether all outputs of replays since the last question were finite; if not, nothing more may be replayed."""
        unseen, self._unseen = self._unseen, []
        finite = not unseen or all_finite(torch.stack([x.float() for x in unseen]))
        self.at_once = self.at_once or not finite
        return finite

    def _is_spoiled_on_any(self, forward: Forward, output: Any) -> bool:
        """As `is_spoiled`, by a collective: so whether a rank takes part may not depend on what that rank has found."""
        tensors = list(_tensors(output))
        # A forward that raised an error has no output, and the others wait elsewhere.
        if not tensors or not any(route.ours for route in forward.routes.values()):
            return False
        assert forward.share is not None, "only then are there other ranks"
        known = torch.full((), bool(forward.run.model_not_finite), device=tensors[0].device)
        wrong = torch.stack([~torch.isfinite(_largest(x)) for x in tensors if x.numel()]).any()
        found = torch.stack([known, wrong]).int()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=forward.share.group)
        anywhere_known, anywhere_wrong = found.tolist()
        return bool(anywhere_wrong and not anywhere_known)

    def record_not_finite(self, forward: Forward, layer: str, reason: str) -> None:
        """Note that the operator's attention was not finite, although PyTorch's dense attention is."""
        run = forward.run
        first = layer not in run.not_finite
        steps = run.not_finite.setdefault(layer, [])
        if forward.step not in steps:
            steps.append(forward.step)
        if first:
            self._fallbacks.warn_or_raise(f"{layer} at step {forward.step + 1} of {run.steps}: {reason}")

    def report_model_not_finite(self, forward: Forward, place: str) -> None:
        """Note that dense attention is not finite either; nothing is computed again in the rest of the run."""
        run = forward.run
        run.watch = False
        run.model_not_finite = (
            f"{place} at step {forward.step + 1} of {run.steps} is not finite with dense attention either: the model "
            "itself made values that are not finite (its dtype, weights or inputs), so the video will be spoiled"
        )
        if self._strict:
            raise FloatingPointError(run.model_not_finite)
        warnings.warn(run.model_not_finite, RuntimeWarning, stacklevel=2)


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; waits for the device.

    It looks at the largest magnitude, which takes one pass and no mask of the tensor's size.
    """
    return all(math.isfinite(_largest(x).item()) for x in tensors if x.numel())


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude; not finite if any value is not."""
    return torch.linalg.vector_norm(x, math.inf)


def is_finite(output: Any) -> bool:
    """`all_finite` of a transformer's output."""
    return all_finite(*_tensors(output))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in an output: a tensor, a tuple or list of them, or a mapping, as diffusers' output classes are."""
    if torch.is_tensor(output):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
