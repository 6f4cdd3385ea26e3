"""What the Hopper kernel's attention takes in time and in power, and what its memory traffic has to do with it.

    python scripts/bench_power.py --output out/power.json
    ncu -k regex:attention_kernel --metrics dram__bytes_read.sum python scripts/bench_power.py --once "in step"

Long calls run at the chip's power limit, which sets the clock. So each variant runs for a while, in turns with the
others, while nvidia-smi is asked for power and clock; what is given are medians of rounds. Variants: programs that wait
for each other (`in step`) and that do not (`free`); `near`: lists of the same lengths whose blocks all lie in the first
quarter of the keys, which the cache holds; and dense FlashAttention-3, where it is importable. Random data, bf16.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dense_attention import FA3_MODULE
from gpu_power import PowerMeter
from operator_bench.workloads import LEVELS, THRESHOLDS, WORKLOADS, Workload
from results import publish

from psa_kernels import AttentionSpec, AttentionStats, BlockLists
from psa_kernels.layout import make_layout

# The first part of a run is at another clock.
SETTLING_SECONDS = 0.1

Call = Callable[[], object]


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_power: no CUDA device")
    rows = []
    for workload in WORKLOADS:
        if workload.name not in options.workload:
            continue
        q, k, v = _inputs(workload)
        for density in options.density:
            calls = variants(q, k, v, workload, density)
            if options.once:
                calls[options.once][0]()
                torch.cuda.synchronize()
                return
            for row in in_turns(calls, workload, options.rounds, options.seconds):
                rows.append(row)
                print(row, flush=True)
    what = "attention of the Hopper kernel in time and power, random data, bf16, medians of rounds"
    settings = {"rounds": options.rounds, "seconds": options.seconds}
    publish(what, rows, options.output, device="cuda", commit=options.commit, **settings)


def variants(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workload: Workload, density: float
) -> dict[str, tuple[Call, float]]:
    """Calls of attention alone by name, and the densities of their lists."""
    from psa_kernels.allocation.triton import allocate
    from psa_kernels.importance.triton import block_importance
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.sparse.hopper import launch as hopper

    spec = AttentionSpec(levels=LEVELS, thresholds=THRESHOLDS[density])
    layout, scale = make_layout(q.shape[1], k.shape[1], 0, workload.text, None), workload.head_dim**-0.5
    pyramid = build_pyramid(k, v, layout, spec)
    lists = allocate(block_importance(q, k, layout, spec, scale), None, spec)
    exact = AttentionStats.from_lists(lists, spec, "").density.mean().item()

    def attend(lists: BlockLists, in_step: bool) -> torch.Tensor:
        hopper.keeps_in_step = lambda *_: in_step
        return hopper.sparse_attention(q, pyramid, lists, layout, spec, scale)

    calls: dict[str, tuple[Call, float]] = {
        "free": (partial(attend, lists, False), exact),
        "in step": (partial(attend, lists, True), exact),
        "near": (partial(attend, near(lists), True), exact),
    }
    if importlib.util.find_spec(FA3_MODULE):
        calls["fa3"] = (partial(importlib.import_module(FA3_MODULE).flash_attn_func, q, k, v), 1.0)
    return calls


def near(lists: BlockLists) -> BlockLists:
    """Lists as long as these, of blocks in the first quarter; some occur twice.

    All rows must be as long as each other.
    """
    place = torch.arange(lists.ids.shape[-1], device=lists.ids.device)
    level = (place >= lists.counts[0, 0, 0].cumsum(0)[:, None]).sum(0)
    ids = lists.ids.long() % (lists.key_blocks // 4)
    order = (level * lists.key_blocks + ids).argsort(-1)
    return replace(lists, ids=ids.gather(-1, order).to(lists.ids.dtype))


def in_turns(
    calls: dict[str, tuple[Call, float]], workload: Workload, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """One row a variant."""
    for call, _ in calls.values():
        call()
    torch.cuda.synchronize()
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    with PowerMeter() as meter:
        for _ in range(rounds):
            for name, (call, _) in calls.items():
                found[name].append(_run(call, seconds, meter))
    rows = []
    for name, (_, density) in calls.items():
        milliseconds, watts, megahertz = (median(column) for column in zip(*found[name], strict=True))
        joules = median(once * power / 1e3 for once, power, _ in found[name])
        rows.append(
            {
                "workload": workload.name,
                "variant": name,
                "density": round(density, 4),
                "ms": round(milliseconds, 3),
                "tflops": round(density * workload.dense_flops / milliseconds / 1e9, 1),
                "watts": round(watts),
                "mhz": round(megahertz),
                "joules": round(joules, 2),
            }
        )
    return rows


def _run(call: Call, seconds: float, meter: PowerMeter) -> tuple[float, float, float]:
    """Median milliseconds of calls back to back, mean watts and MHz."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(max(3, int(1e3 * seconds / start.elapsed_time(end))))]
    for event in events:
        call()
        event.record()
    begun = time.monotonic()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(events)]
    return median(times), *meter.between(begun + SETTLING_SECONDS, time.monotonic())


def _inputs(workload: Workload) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = (1, workload.tokens, workload.heads, workload.head_dim)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", choices=names, nargs="+", default=["wan2.1-14b-720p"])
    parser.add_argument("--density", type=float, choices=tuple(THRESHOLDS), nargs="+", default=[0.15, 0.25])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long a variant runs in a round")
    parser.add_argument("--once", choices=("free", "in step", "near"), help="only call a variant once, for a profiler")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="default: git's HEAD")
    return parser.parse_args()


if __name__ == "__main__":
    main()
