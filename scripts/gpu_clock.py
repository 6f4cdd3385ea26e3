"""What repeated calls take on a CUDA device, and calls that a CUDA graph repeats."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def repeated(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds and peak memory in GiB, all that is there included, of calls that ran before."""
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times), 2), round(torch.cuda.max_memory_allocated() / 2**30, 2)


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """A replay of a call from a CUDA graph; what the call returned is filled anew each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> T:
        graph.replay()
        return output

    return replay
