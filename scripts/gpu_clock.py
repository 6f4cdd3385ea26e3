"""What repeated calls take on a CUDA device."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


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
