"""Transformers whose forwards are captured into CUDA graphs, each kind once, and replayed.

A small forward takes a GPU less time than the host needs to launch it. A replay is one launch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from psa_diffusers.diffusers_internals import keeps_state_between_forwards
from psa_diffusers.patch.modules import find_transformers
from psa_diffusers.patch.replays import Recording, attended, capturing, note_replay

# Each graph keeps copies of its inputs and its output. A run has a few kinds of forwards.
MOST = 16
MANY = "more than {most} kinds of forwards; the others are launched one operation at a time"
FAILED = "a forward cannot be captured into a CUDA graph, and is launched one operation at a time: {error}"
_NEW: Any = object()  # stands for the graph of a kind that has not come before
Compute = Callable[[], Any]
# Captures what a function computes on a device: returns its results, in memory that stays, and what computes them anew
# there.
Capture = Callable[[Compute, torch.device], tuple[Any, Callable[[], None]]]


def replay_forwards(pipe: Any) -> None:
    """Replace the forwards of all transformers of a pipeline by replays of themselves, from the second of a kind on.

    For pipelines whose weights, modules and attention processors nobody changes but this package's patch: graphs go on
    with the memory and the kernels that they were captured with. Results are equal to the last bit.
    """
    for transformer in find_transformers(pipe).values():
        replay_forward(transformer)


def replay_forward(transformer: torch.nn.Module, capture: Capture | None = None) -> None:
    """As `replay_forwards`, of one transformer; `capture` captures on a CUDA device unless given."""
    graphs = ForwardGraphs(transformer, capture or _OnCuda())

    @functools.wraps(transformer.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graphs(*args, **kwargs)

    transformer.forward = forward


@dataclass
class _Graph:
    """A captured forward: the tensors that it reads, in order; what it returns and notes; and its replay."""

    inputs: list[torch.Tensor]
    output: Any
    recording: Recording
    replay: Callable[[], None]


class ForwardGraphs:
    """The graphs of one transformer; called as its forward.

    Forwards are of one kind if their arguments are alike, but for the values in tensors, and if they attend the same.
    The first one of a kind is computed as ever, and then captured. What cannot be captured is computed as ever too; one
    line on stderr says why, unless this package needs it so.
    """

    def __init__(self, transformer: torch.nn.Module, capture: Capture) -> None:
        self._transformer, self._own, self._capture = transformer, transformer.forward, capture
        self._graphs: dict[Hashable, _Graph | None] = {}  # None for a kind that cannot be captured
        self._told: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or (attends := attended(self._transformer)) is None:
            return self._own(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        key = structure, attends, tuple(_kind(each) for each in leaves)
        try:
            graph = self._graphs.get(key, _NEW)
        except TypeError:  # an argument that cannot be compared
            graph = None
        if graph is None:
            return self._own(*args, **kwargs)
        if graph is not _NEW:
            return self._replay(graph, _tensors(leaves))
        output = self._own(*args, **kwargs)  # compiles kernels, and fills what the graph reads
        self._graphs[key] = self._captured(args, kwargs) if self._may_capture() else None
        return output

    def _may_capture(self) -> bool:
        if sum(graph is not None for graph in self._graphs.values()) >= MOST:
            self._tell(MANY.format(most=MOST))
            return False
        if keeps_state_between_forwards(self._transformer):
            self._tell(FAILED.format(error="a cache decides at each forward what is computed"))
            return False
        return True

    def _captured(self, args: tuple, kwargs: dict[str, Any]) -> _Graph | None:
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        inputs = _tensors(tree_flatten((args, kwargs))[0])

        def compute() -> tuple[Any, Recording]:
            with capturing(self._transformer) as recording:
                output = self._own(*args, **kwargs)
            return output, recording

        try:
            (output, recording), replay = self._capture(compute, inputs[0].device)
        except Exception as error:  # whatever it is, the forward has just been computed without a graph
            self._tell(FAILED.format(error=_first_line(error)))
            return None
        return _Graph(inputs, output, recording, replay)

    def _replay(self, graph: _Graph, tensors: list[torch.Tensor]) -> Any:
        for kept, given in zip(graph.inputs, tensors, strict=True):
            kept.copy_(given)
        graph.replay()
        note_replay(self._transformer, graph.recording)
        # The next replay writes to the same memory, perhaps before this output is read.
        return tree_map_only(torch.Tensor, torch.clone, graph.output)

    def _tell(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            print(f"warning: {type(self._transformer).__name__}: {line}", file=sys.stderr, flush=True)


class _OnCuda:
    """Captures into CUDA graphs that share their memory: what they return is copied before another one is replayed."""

    def __init__(self) -> None:
        self._place: tuple[Any, torch.cuda.Stream] | None = None

    def __call__(self, compute: Compute, device: torch.device) -> tuple[Any, Callable[[], None]]:
        with contextlib.ExitStack() as stack:
            # The model may be on another device than the current one, and nothing would be captured there.
            stack.enter_context(torch.cuda.device(device))
            # A capture that fails leaves its stream the current one.
            stack.enter_context(torch.cuda.stream(torch.cuda.current_stream()))
            warned = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")  # the forward before has warned already
            pool, stream = self._place or (torch.cuda.graph_pool_handle(), torch.cuda.Stream())
            self._place, graph = None, torch.cuda.CUDAGraph()
            # Other threads may use the device, for files or sound.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                results = compute()
        if any("CUDA Graph is empty" in str(each.message) for each in warned):
            raise RuntimeError(f"nothing was launched on {device}")
        self._place = pool, stream  # after a failure no other graph could be captured there
        return results, graph.replay


def _first_line(error: BaseException) -> str:
    """The first line of an error, or of the one that it came from: the end of a capture fails as well."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [each for each in leaves if torch.is_tensor(each)]


def _kind(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if torch.is_tensor(leaf) else leaf
