"""Time and memory of one call on a CUDA device, and the rows that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from operator_bench.workloads import Case, Workload

# What times a call so many times: milliseconds, and GiB beyond the inputs where it can tell.
Timer = Callable[[Callable[[], object], int], tuple[float, float | None]]
# About 20 ms, in which the host enqueues the calls.
HEAD_START_CYCLES = 40_000_000
SLOW_MS = 100
SLOW_REPEATS = 3


def rows_of(case: Case, workload: Workload, repeats: int, timer: Timer | None = None) -> Iterator[dict[str, Any]]:
    """One row for each method that the case stands for, timed by `measure` unless another timer is given."""
    try:
        figures = figures_of(case, workload, *(timer or measure)(case.call, repeats))
    except Exception as error:  # a call that does not run here is a fact to report, not a reason to stop
        torch.cuda.empty_cache()
        figures = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    density = None if case.density is None else round(case.density, 4)
    for method in case.methods:
        yield {"workload": workload.name, "method": method, "density": density, "stage": case.stage, **figures}


def figures_of(case: Case, workload: Workload, milliseconds: float, extra_gib: float | None) -> dict[str, float | None]:
    """Effective TFLOP/s is density x dense FLOPs / time, which only the stages that attend have."""
    tflops = None
    if case.density is not None and case.stage in ("total", "attention"):
        tflops = round(case.density * workload.dense_flops / milliseconds / 1e9, 1)
    return {
        "ms": round(milliseconds, 4),
        "tflops": tflops,
        "extra_gib": None if extra_gib is None else round(extra_gib, 3),
    }


def measure(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median milliseconds, and peak memory in GiB beyond the inputs: what the call returns is counted.

    After two calls to warm up the calls are enqueued back to back, each between two events, and nobody waits in
    between. The device is kept busy meanwhile, so that the host is ahead of it, as it is in a pipeline.
    """
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    [once] = _enqueue(call, 1)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    return median(_enqueue(call, min(repeats, SLOW_REPEATS) if once > SLOW_MS else repeats)), extra


def _enqueue(call: Callable[[], object], times: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda._sleep(HEAD_START_CYCLES)
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
