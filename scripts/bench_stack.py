"""Time what a whole run takes as one thing after the other is switched on: `python scripts/bench_stack.py`.

    python scripts/bench_stack.py --workload wan2.1-14b-720p --output docs/benchmarks/stack.json

Needs a CUDA device, but for `--tiny`; the 8-bit line needs torchao. Weights are random. Lines: compiled blocks and
cuDNN attention; PSA at density 0.15; linear layers in float8; kept lists; dense steps by PSA's kernel; diffusers'
first-block cache. Each is with all before it; one that does not run here is a row with its error, and those after it do
without.

The time of a run of 50 steps is a sum of measured forwards: a quarter of the steps dense, both guidance branches, lists
made anew as often as the preset says, and of the cache as many forwards skipped as it skips on the demo model, whose
PSNR against its stock videos stands beside each line (`demo_psnr`, dB). `speedup` is against the first line.
docs/recipes.md has each line as a user types it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_model import Models, attempt, compile_blocks
from dense_attention import prefer_cudnn
from earlier_rows import read_rows
from gpu_clock import repeated
from one_step import STEPS, OneStep
from random_models import WORKLOADS, Machine, Workload, make_inputs, pick_machine
from results import document, publish, write
from stack_lines import Line, cached, lines, quantise_linear
from stack_quality import Demo

from psa_diffusers import PSAProcessor

ROOT = Path(__file__).resolve().parents[1]
WHAT = "runs of 50 steps as sums of measured forwards, random weights, medians"
CHOSEN = ("wan2.1-14b-720p", "hunyuanvideo-720p", "wan2.1-1.3b-480p", "h3-10s")
NEVER, ALWAYS = -1.0, 1e9  # thresholds of the cache that skip no forward, and each that can be


def main() -> None:
    options = _arguments()
    machine = pick_machine(options.tiny, "bench_stack")
    rows = read_rows(options.merge, options.output, machine.device)
    quality = Quality(machine, options)
    for name in options.workload or CHOSEN:
        # Other scales are another run, with a first line of its own.
        mine = [row for row in rows if (row["workload"], row["scales"]) == (name, options.scales)]
        known = {row["stack"]: row for row in mine if "error" not in row}
        rows = [row for row in rows if row not in mine]
        for row in measure(WORKLOADS[name], options, machine, quality, known):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                write(document(WHAT, rows, device=machine.device, commit=options.commit), options.output)
    publish(WHAT, rows, options.output, device=machine.device, commit=options.commit)


class Quality:
    """Figures of the demo model, measured once a line; none without `--demo-prompts`."""

    def __init__(self, machine: Machine, options: argparse.Namespace) -> None:
        self._machine, self._prompts = machine, options.demo_prompts
        self._demo: Demo | None = None
        self._figures: dict[Line, dict[str, Any]] = {}

    def of(self, line: Line) -> dict[str, Any]:
        """As `Demo.figures`."""
        if line not in self._figures:
            self._demo = self._demo or Demo(self._machine, self._prompts)
            self._figures[line] = self._demo.figures(line)
        return self._figures[line]


def measure(
    workload: Workload,
    options: argparse.Namespace,
    machine: Machine,
    quality: Quality,
    known: dict[str, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Rows of all lines on one workload; those that are known, by their lines' names, are not measured again."""
    torch.manual_seed(0)
    transformer = Models(machine).get(workload.checkpoint)
    inputs = make_inputs(workload.checkpoint, transformer, machine, latents=workload.latents, sizes=workload.sizes)
    started = time.perf_counter()
    forwards = Forwards(transformer, inputs, options.repeats, machine)
    failed: dict[str, Any] = {}
    first: float | None = None
    for field, line in lines(options.cache, options.scales):
        line = replace(line, **failed)
        row = {"workload": workload.name, "scales": options.scales, "stack": line.name, "cache": line.cache}
        earlier = known.get(line.name)
        figures, reason = attempt(
            lambda line=line, field=field, earlier=earlier: run(
                forwards, line, field, workload.branches, quality, earlier
            ),
            machine,
        )
        if figures is None:
            if field:
                failed[field] = getattr(Line(), field)
            yield {**row, "error": reason}
            continue
        print(f"{line.name}: {time.perf_counter() - started:.0f} s in all", flush=True)
        first = figures["seconds_50"] if first is None and not field else first
        speedup = None if first is None else round(first / figures["seconds_50"], 3)
        yield {**row, **figures, "speedup": speedup}


def run(
    forwards: Forwards, line: Line, field: str, branches: int, quality: Quality, known: dict[str, Any] | None
) -> dict[str, Any]:
    """Times of one line; the transformer is left as it was, but that its linear layers stay in 8 bits.

    Args:
        field: what the line switches on.
        branches: forwards a step.
        known: the line's earlier row, which is taken as it is.
    """
    if field == "float8":
        assert line.float8 is not None, "the line switches it on"
        quantise_linear(forwards.transformer, line.float8)
    if known is not None:
        return known
    demo = quality.of(line)
    with prefer_cudnn(), torch.no_grad():
        # A step of the cache's own: it stands still while forwards are timed, and the forward that it skips is timed
        # beside those that it lets through.
        passed = None if line.cache is None else NEVER
        dense, dense_peak = forwards.dense(line, passed)
        sparse, sparse_peak, made = dense, dense_peak, None
        if line.psa:
            sparse, sparse_peak = forwards.sparse(line, passed)
        if line.kept:
            made, _ = forwards.sparse(replace(line, kept=False), passed)
            served = line.forwards_a_list(branches)
            sparse = (made + (served - 1) * sparse) / served
        skipped = None
        if line.cache is not None:
            skipped, _ = forwards.sparse(line, ALWAYS)
    seconds = seconds_of_a_run(dense, sparse, branches, skipped, demo)
    tiny = forwards.machine.tiny
    return {
        "ms_dense": round(dense, 2),
        "ms_sparse": round(sparse, 2),
        "ms_lists_made": None if made is None else round(made, 2),
        "ms_skipped": None if skipped is None else round(skipped, 2),
        "seconds_50": seconds if tiny else round(seconds, 2),
        "peak_gib": None if tiny else max(dense_peak or 0.0, sparse_peak or 0.0),
        "demo_psnr": demo["psnr"],
        "skipped_dense": demo["skipped_dense"],
        "skipped_sparse": demo["skipped_sparse"],
    }


def seconds_of_a_run(
    dense: float, sparse: float, branches: int, skipped: float | None, shares: dict[str, Any]
) -> float:
    """Seconds of 50 steps, of which the first quarter is dense.

    Args:
        dense, sparse: milliseconds of a forward that is computed.
        branches: forwards a step.
        skipped: milliseconds of a forward that the cache skips; None without a cache.
        shares: of the forwards of either kind that are skipped, `skipped_dense` and `skipped_sparse`.
    """
    if skipped is not None:
        dense += shares["skipped_dense"] * (skipped - dense)
        sparse += shares["skipped_sparse"] * (skipped - sparse)
    dense_steps = math.ceil(0.25 * STEPS)
    return branches * (dense_steps * dense + (STEPS - dense_steps) * sparse) / 1000


class Forwards:
    """Forwards of one transformer, timed; lines whose forward is the same share one figure.

    Args:
        repeats: timed forwards, whose median counts.
    """

    def __init__(self, transformer: torch.nn.Module, inputs: dict[str, Any], repeats: int, machine: Machine) -> None:
        self.transformer, self.machine = transformer, machine
        self._inputs, self._repeats = inputs, repeats
        self._known: dict[tuple[Line, int, float | None], tuple[float, float | None]] = {}

    def dense(self, line: Line, threshold: float | None) -> tuple[float, float | None]:
        """Median milliseconds and peak memory in GiB of a forward of the dense phase.

        There are no lists in it, and unless PSA's kernel computes it, it is stock.
        """
        return self._once(replace(line, psa=line.dense_psa, kept=False), 0, threshold)

    def sparse(self, line: Line, threshold: float | None) -> tuple[float, float | None]:
        """Those of a forward at a sparse step; lists that are kept are there already."""
        return self._once(replace(line, dense_psa=False), STEPS - 1, threshold)

    def _once(self, line: Line, step: int, threshold: float | None) -> tuple[float, float | None]:
        key = (line, step, threshold)
        if key not in self._known:
            self._known[key] = self._time(line, step, threshold)
        return self._known[key]

    def _time(self, line: Line, step: int, threshold: float | None) -> tuple[float, float | None]:
        transformer, machine = self.transformer, self.machine
        pipe = OneStep(transformer, self._inputs, step=step)
        processor = PSAProcessor(pipe, line.preset(machine)) if line.psa else None
        try:
            if threshold is None:
                compile_blocks(transformer, machine.backend)
                around = nullcontext()
            else:
                around = cached(transformer, threshold, machine.backend)
            with around:
                if processor:
                    processor.install()
                call: Callable[[], torch.Tensor] = lambda: transformer(**self._inputs, return_dict=False)[0]  # noqa: E731
                # A second one, in case that reading the lists which the first one made compiles something.
                for _ in range(1 if machine.tiny else 2):
                    if not bool(call().isfinite().all()):
                        raise RuntimeError("the output is not finite")
                ms, peak = clock(call, self._repeats, machine)
                if processor and threshold != ALWAYS:
                    _check(processor, line, dense=not step)
                return ms, peak
        finally:
            if processor:
                processor.restore()
            for module in transformer.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()


def clock(call: Callable[[], torch.Tensor], repeats: int, machine: Machine) -> tuple[float, float | None]:
    """Median milliseconds and peak memory in GiB of calls that ran before."""
    if not machine.tiny:
        return repeated(call, repeats)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1000, None


def _check(processor: PSAProcessor, line: Line, dense: bool) -> None:
    """That a forward was what its line says.

    Raises:
        RuntimeError: it was not.
    """
    stats = processor.stats()
    if dense and line.dense_psa and stats.dense_implementation is None:
        raise RuntimeError("PSA's kernel computed no dense step")
    if not dense and stats.density_sparse is None:
        raise RuntimeError(f"attention was dense: {'; '.join(stats.fallbacks)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help=f"default: {CHOSEN}")
    parser.add_argument("--cache", type=float, default=0.05, help="threshold of the first-block cache; default: 0.05")
    parser.add_argument("--demo-prompts", type=int, default=3, help="videos of the demo model a line; default: 3")
    parser.add_argument(
        "--scales", choices=("row", "tensor"), default="row", help="of float8, one each; default: %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes on the CPU: shows that it runs, measures nothing"
    )
    parser.add_argument("--merge", type=Path, help="JSON of an earlier run on the same machine, to complete")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/stack.json, and none with --tiny")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/stack.json"
    return options


if __name__ == "__main__":
    main()
