"""Time variants of the attention kernels, and the operator with and without groups of heads, on a GPU like the H200.

`python scripts/time_variants.py --output variants.json`: first every variant is checked against float64 on a small
call, one that overflows included; a variant that fails is not timed. Then variants take turns, several rounds, so that
all see the same clock; figures are medians of rounds. The last part runs whole calls with the pyramids of all heads at
once and of groups of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from operator_bench.workloads import LEVELS, THRESHOLDS, WORKLOADS

from psa_kernels import AttentionSpec, AttentionStats, Importance, head_groups, psa_attention, select_blocks
from psa_kernels.layout import make_layout
from psa_kernels.pyramid.triton import build_pyramid
from psa_kernels.sparse import hopper
from psa_kernels.sparse import triton as portable

HOPPER = {
    "base": {"LATE_SUM": False, "POLYNOMIAL": 0},
    "late sum": {"LATE_SUM": True, "POLYNOMIAL": 0},
    "late sum, 1 in 8": {"LATE_SUM": True, "POLYNOMIAL": 8},
    "late sum, 1 in 4": {"LATE_SUM": True, "POLYNOMIAL": 4},
}
PORTABLE = {"base": (), "late sum": (9,)}
DENSITIES = (0.15, 0.25)
IMPORTANCE = Importance("pooled", "mean", 8, 8)
# Of the error of the kernel as it is.
MOST_ERROR = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--workload", choices=[workload.name for workload in WORKLOADS], help="default: all but Hunyuan"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        options.output.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")

    sound: dict[int, set[tuple[str, str]]] = {}
    for head_dim, text in ((64, 226), (128, 0)):
        sound[head_dim] = set()
        for row in check(head_dim, text):
            add(row)
            if row["sound"]:
                sound[head_dim].add((row["kernel"], row["variant"]))
    for workload in WORKLOADS:
        if options.workload == workload.name or (options.workload is None and "hunyuan" not in workload.name):
            for row in time_attention(workload, sound[workload.head_dim], options.rounds):
                add(row)
    if options.workload is None:
        for row in time_groups(options.rounds):
            add(row)


@contextmanager
def variant(kernel: str, name: str) -> Iterator[None]:
    """Kernels as a variant has them."""
    before = hopper.softmax, portable.LATE_SUM
    if kernel == "hopper":
        hopper.softmax = lambda head_dim, online: HOPPER[name]
    else:
        portable.LATE_SUM = PORTABLE[name]
    try:
        yield
    finally:
        hopper.softmax, portable.LATE_SUM = before


def variants() -> list[tuple[str, str]]:
    return [("hopper", name) for name in HOPPER] + [("triton", name) for name in PORTABLE]


def check(head_dim: int, text: int) -> Iterator[dict[str, Any]]:
    """Errors of every variant relative to float64, on ordinary inputs and on some whose later logits overflow."""
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    tokens = 1100 + text
    ordinary = [torch.randn(1, tokens, 16, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    # Queries and later video keys share a direction: logits grow by 200.
    direction = torch.ones(head_dim, device="cuda") / head_dim**0.5
    q, k, v = (x.clone() for x in ordinary)
    q = (0.1 * q + 4 * direction).to(q.dtype)
    k[:, 600:1100] = (k[:, 600:1100] + direction * 200 * head_dim**0.5 / 4).to(k.dtype)
    cases = {"ordinary": ordinary, "overflow": [q, k, v]}
    errors: dict[tuple[str, str], dict[str, float]] = {which: {} for which in variants()}
    for case, tensors in cases.items():
        lists = select_blocks(*tensors[:2], spec, text_after=text, implementation="triton")
        call = {"text_after": text, "lists": lists}
        expected = psa_attention(*(x.double() for x in tensors), spec, implementation="reference", **call)
        for which in errors:
            with variant(*which):
                found = psa_attention(*tensors, spec, implementation=which[0], **call)
            errors[which][case] = ((found.double() - expected).norm() / expected.norm()).item()
    for (kernel, name), found in errors.items():
        base = errors[kernel, "base"]
        good = all(found[case] <= MOST_ERROR * base[case] for case in cases)
        yield {"head_dim": head_dim, "kernel": kernel, "variant": name, "errors": found, "sound": good}


def time_attention(workload: Any, sound: set[tuple[str, str]], rounds: int) -> Iterator[dict[str, Any]]:
    """Attention alone, all heads at once."""
    shape = (1, workload.tokens, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    layout, scale = make_layout(q.shape[1], k.shape[1], 0, workload.text, None), workload.head_dim**-0.5
    for nominal in DENSITIES:
        spec = AttentionSpec(levels=LEVELS, thresholds=THRESHOLDS[nominal], importance=IMPORTANCE)
        lists = select_blocks(q, k, spec, text_after=workload.text, implementation="triton")
        pyramid = build_pyramid(k, v, layout, spec)
        density = AttentionStats.from_lists(lists, spec, "").density.mean().item()
        calls = {}
        for kernel, name in sorted(sound):
            attend = hopper.sparse_attention if kernel == "hopper" else portable.sparse_attention
            calls[kernel, name] = partial(attend, q, pyramid, lists, layout, spec, scale)
        for (kernel, name), ms in take_turns(calls, rounds).items():
            tflops = round(density * workload.dense_flops / ms / 1e9, 1)
            yield {
                "workload": workload.name, "density": nominal, "kernel": kernel, "variant": name, "ms": round(ms, 4),
                "tflops": tflops,
            }  # fmt: skip


def take_turns(calls: dict[tuple[str, str], Callable[[], object]], rounds: int) -> dict[tuple[str, str], float]:
    """Median milliseconds of each call; every round makes each twice and counts the second."""
    times: dict[tuple[str, str], list[float]] = {which: [] for which in calls}
    for turn in range(rounds + 1):
        for which, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with variant(*which):
                call()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            if turn:  # the first compiles
                times[which].append(start.elapsed_time(end))
    return {which: median(found) for which, found in times.items()}


def time_groups(rounds: int) -> Iterator[dict[str, Any]]:
    """Whole calls of Wan2.1-14B at 720p: time and peak memory beyond the inputs, output counted."""
    [workload] = [workload for workload in WORKLOADS if workload.name == "wan2.1-14b-720p"]
    shape = (1, workload.tokens, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    share = head_groups.LARGEST_SHARE
    for kernel in ("hopper", "triton"):
        for order in ("raster", "permuted"):
            permutation = None if order == "raster" else torch.randperm(workload.tokens, device="cuda")
            for nominal in DENSITIES:
                spec = AttentionSpec(levels=LEVELS, thresholds=THRESHOLDS[nominal], importance=IMPORTANCE)
                call = partial(psa_attention, q, k, v, spec, permutation=permutation, implementation=kernel)
                found: dict[str, list[float]] = {"all heads": [], "groups": []}
                memory, results = {}, {}
                for turn in range(rounds):
                    for name, times in found.items():
                        head_groups.LARGEST_SHARE = share if name == "groups" else 1e9
                        call()
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                        torch.cuda._sleep(40_000_000)  # the host gets ahead, as in a pipeline
                        start.record()
                        out = call()
                        end.record()
                        torch.cuda.synchronize()
                        times.append(start.elapsed_time(end))
                        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
                        if turn == 0:
                            results[name] = out
                        del out
                    if turn == 0:
                        same = torch.equal(*results.values())
                        results.clear()
                head_groups.LARGEST_SHARE = share
                for name, times in found.items():
                    yield {
                        "workload": workload.name, "order": order, "density": nominal, "kernel": kernel,
                        "variant": name, "ms": round(median(times), 4), "extra_gib": round(memory[name], 3),
                        "same bits": same,
                    }  # fmt: skip


if __name__ == "__main__":
    main()
