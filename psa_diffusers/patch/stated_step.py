"""Forwards whose step the user states, so that they can be captured into CUDA graphs.

A replay runs no Python: it attends as the captured forward did. So a graph belongs to one step, which the user states.
All that a replay reads on the device has to stay where it was: the permutation, and kept lists, which are written into
the same tensors each time. They live as long as the transformer, whose weights the graph reads as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CAPTURED = (
    "a forward of a transformer patched with PSAProcessor cannot be captured into a CUDA graph: nobody has stated its "
    "step, and a replay would go on with that of the capture. State it, `with psa.run(timesteps), psa.step(index):` "
    "around the capture and around the same forward before it, and capture one graph for each kind of step; "
    'torch.compile(mode="reduce-overhead") needs none of that, and leaves the attention out of its graphs; or call '
    "restore() before the capture"
)
CANNOT = "this forward cannot be captured into a CUDA graph: "
NOT_WARM = (
    CANNOT + "{layer} has not attended a call like this yet; run the same forward once before the capture, inside the "
    "same psa.step(...)"
)
PADDED = (
    CANNOT + "how many text tokens are real is read from the mask at each forward, and a replay would keep the number "
    "of the capture; state it, psa.step(index, text_tokens=(number for each sample,)), and capture one graph for each"
)
SHARED = CANNOT + "it is shared by several processes (context parallelism)"
CACHED = CANNOT + "a cache of diffusers decides at each forward what is computed; disable it before the capture"
COMPUTED = CANNOT + "what stands in for sparse attention, to measure it, looks at values"
FULL = "dense_attention: psa has no effect on forwards captured into a CUDA graph; dense ones keep the model's own"
CORRECTED = "correction: true has no effect on forwards captured into a CUDA graph; it lives as long as a run"
UNSEEN = (
    "a forward is being captured into a CUDA graph: what its replays attend is not in stats(), no masks of it are "
    "recorded, and nothing looks for values in it that are not finite"
)

_held: weakref.WeakKeyDictionary[torch.nn.Module, dict[int, Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StatedStep:
    """What the user states about forwards.

    Attributes:
        index: of the step in its run, counted from 0.
        branch: the guidance branch: which forward of the step it is, counted from 0.
        text_tokens: how many text tokens of each sample are no padding; None to read that from the mask.
    """

    index: int
    branch: int = 0
    text_tokens: tuple[int, ...] | None = None


def stated_step(index: int, steps: int, branch: int, text_tokens: Sequence[int] | None) -> StatedStep:
    """Check what the user states about forwards in a run of `steps` steps.

    Raises:
        ValueError: a value is no integer, or out of range.
    """
    if not _is_count(index) or index >= steps:
        raise ValueError(f"index={index!r}: expected a step of the run, an integer from 0 to {steps - 1}")
    if not _is_count(branch):
        raise ValueError(f"branch={branch!r}: expected an integer, 0 or more")
    if text_tokens is not None:
        if not isinstance(text_tokens, Sequence) or not len(text_tokens) or not all(map(_is_count, text_tokens)):
            raise ValueError(f"text_tokens={text_tokens!r}: expected a number of text tokens for each sample")
        text_tokens = tuple(text_tokens)
    return StatedStep(index, branch, text_tokens)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph, in which no value can be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def hold(transformer: torch.nn.Module, *tensors: torch.Tensor | None) -> None:
    """Keep what a captured graph reads as long as the transformer lives."""
    held = _held.setdefault(transformer, {})
    held.update((id(each), each) for each in tensors if each is not None)


def held(transformer: torch.nn.Module) -> list[torch.Tensor]:
    """What `hold` keeps for a transformer."""
    return list(_held.get(transformer, {}).values())


class WarmCalls:
    """Remembers which kinds of sparse calls were made eagerly, so that kernels are compiled and tables in place."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def add(self, layer: Any, q: torch.Tensor) -> None:
        """Note a call of a layer."""
        self._seen.add(_kind(layer, q))

    def check(self, layer: Any, q: torch.Tensor) -> None:
        """Check that a call may be captured.

        Raises:
            RuntimeError: no call like it was made eagerly before.
        """
        if _kind(layer, q) not in self._seen:
            raise RuntimeError(NOT_WARM.format(layer=layer.name))


def _kind(layer: Any, q: torch.Tensor) -> Hashable:
    return layer.name, layer.spec, layer.order, q.shape, q.dtype, q.device


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
