"""Time and memory of one attention call from 8 thousand to 480 thousand tokens, sparse and dense.

    python scripts/bench_scaling.py
    python scripts/bench_scaling.py --tiny

Random data, head_dim 128, bf16 on a CUDA device; a few heads, because time is proportional to their number once there
is work for the whole device. Sparse calls choose their own implementation, as they do in a pipeline. Dense peers are
those of bench_operator.py; one that is not importable is skipped, one that does not fit becomes a row with its error.
Times are medians of calls enqueued back to back, extra memory is the peak beyond the inputs, output included.

At every length some query blocks of the sparsest call, the first and the last among them, are compared with the
reference in float32 with the same lists. Last, the longest sequence runs with the heads of a whole layer of Wan2.1-14B:
more than 2^31 elements a tensor. The exit code is 1 if anything is not finite or off by more than bf16 explains.

Writes JSON and, beside it, a plot; `--plot-only` makes that again. `--tiny` runs a toy in float32, on a CPU too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from operator_bench import peers
from operator_bench.scaling_plot import plot
from operator_bench.timing import measure, rows_of
from operator_bench.workloads import Case, Workload
from results import publish

from psa_kernels import AttentionSpec, BlockLists, psa_attention, select_blocks
from psa_kernels.layout import make_layout
from psa_kernels.sparse.reference import sparse_attention
from psa_presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144, 480_000)
HEADS, WIDE_HEADS, HEAD_DIM = 8, 40, 128
TINY_LENGTHS, TINY_HEADS, TINY_WIDE_HEADS, TINY_HEAD_DIM = (512, 1_000), 2, 3, 16
# The sparsest comes first.
THRESHOLDS = {density: load_preset("psa-3").at_density(density).thresholds for density in (0.05, 0.15, 0.25)}
DENSE = ("sdpa-cudnn", "fa3")
# Relative error of the compared rows; bf16 alone gives less than half of it.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}

Row = dict[str, Any]


def main() -> int:
    options = _arguments()
    if options.plot_only:
        plot(json.loads(options.plot_only.read_text())["rows"], options.plot_only.with_suffix(".png"))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_scaling: no CUDA device; --tiny runs a toy on a CPU")
    rows = []
    for row in _rows(options):
        rows.append(row)
        print(_line(row), flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    what = "one attention call at growing lengths, random data, medians"
    settings = {"head_dim": TINY_HEAD_DIM if options.tiny else HEAD_DIM, "dtype": str(_dtype(options))}
    publish(what, rows, options.output, device=device, commit=options.commit, **settings)
    if options.output:
        plot(rows, options.output.with_suffix(".png"))
    return 0 if all(_is_right(row, TOLERANCE[_dtype(options)]) for row in rows) else 1


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    """All lengths with few heads, then the longest with the heads of a whole layer."""
    lengths = TINY_LENGTHS if options.tiny else options.lengths
    heads, wide, width = (TINY_HEADS, TINY_WIDE_HEADS, TINY_HEAD_DIM) if options.tiny else (HEADS, WIDE_HEADS, HEAD_DIM)
    for tokens in lengths:
        q, k, v = _inputs(tokens, heads, width, options)
        for case in _dense(q, k, v):
            yield from _timed(case, q, options)
        for density in THRESHOLDS:
            yield from _sparse(q, k, v, density, options)
    del q, k, v
    yield from _sparse(*_inputs(max(lengths), wide, width, options), min(THRESHOLDS), options)


def _inputs(tokens: int, heads: int, width: int, options: argparse.Namespace) -> list[torch.Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.randn(1, tokens, heads, width, dtype=_dtype(options), device=device) for _ in range(3)]


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    if q.is_cuda and q.dtype == torch.bfloat16:
        yield from (case for case in peers.dense_cases(q, k, v) if case.methods[0] in DENSE)
    else:

        def call() -> torch.Tensor:
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

        yield Case(("sdpa",), 1.0, "total", call)


def _sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float, options: argparse.Namespace
) -> Iterator[Row]:
    """The row of one density; for the sparsest with the error of some of its query blocks."""
    spec = AttentionSpec(thresholds=THRESHOLDS[density])
    try:
        lists = select_blocks(q, k, spec)
        out, stats = psa_attention(q, k, v, spec, lists=lists, return_stats=True)
        about: Row = {"asked": density, "implementation": stats.implementation, "finite": bool(out.isfinite().all())}
        if density == min(THRESHOLDS):
            about["relative_error"] = worst_error(q, k, v, out, lists, spec)
        del out, lists
        exact = stats.density.mean().item()
    except torch.OutOfMemoryError as error:
        about = {"error": str(error).splitlines()[0], "tokens": q.shape[1], "heads": q.shape[2], "method": "psa"}
        yield {**about, "density": density, "asked": density}
        return
    for row in _timed(Case(("psa",), exact, "total", lambda: psa_attention(q, k, v, spec)), q, options):
        yield {**row, **about}


def worst_error(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lists: BlockLists, spec: AttentionSpec
) -> float:
    """Largest relative error over the first, a middle and the last query block of the first and the last head.

    Args:
        q, k, v, out: `[1, N, H, D]`, without text.
        lists: those that `out` was computed with.
    """
    tokens, blocks = q.shape[1], lists.ids.shape[2]
    worst = 0.0
    for head in sorted({0, q.shape[2] - 1}):
        one = [x[:, :, head : head + 1] for x in (q, k, v, out)]
        keys, values = (x.float() for x in one[1:3])
        for block in sorted({0, blocks // 2, blocks - 1}):
            here = slice(block * spec.block_query, min((block + 1) * spec.block_query, tokens))
            row = lists[:, head : head + 1]
            row = dataclasses.replace(row, ids=row.ids[:, :, [block]], counts=row.counts[:, :, [block]])
            queries = one[0][:, here].float()
            layout = make_layout(queries.shape[1], tokens, 0, 0, None)
            exact = sparse_attention(queries, keys, values, row, layout, spec, q.shape[-1] ** -0.5)
            error = float((one[3][:, here].float() - exact).norm() / exact.norm())
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _timed(case: Case, q: torch.Tensor, options: argparse.Namespace) -> Iterator[Row]:
    workload = Workload("", q.shape[2], q.shape[3], (1, 1, q.shape[1]))
    timer = measure if q.is_cuda else _wall_clock
    for row in rows_of(case, workload, options.repeats, timer):
        del row["workload"], row["stage"]
        yield {"tokens": workload.tokens, "heads": workload.heads, **row}


def _wall_clock(call: Callable[[], object], repeats: int) -> tuple[float, None]:
    """As `operator_bench.timing.measure`, where there is no CUDA device; memory is not told."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return median(times), None


def _is_right(row: Row, tolerance: float) -> bool:
    """A dense peer that does not fit is no failure; anything else that is wrong is."""
    if row["method"] != "psa":
        return True
    return "ms" in row and row["finite"] and row.get("relative_error", 0.0) < tolerance


def _dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.tiny else torch.bfloat16


def _line(row: Row) -> str:
    density = "" if row["density"] is None else f"{row['density']:.4f}"
    label = f"{row['tokens']:7} tokens {row['heads']:3} heads  {row['method']:11} {density:6}"
    if "ms" not in row:
        return f"{label} {row['error']}"
    memory = "" if row["extra_gib"] is None else f"{row['extra_gib']:7.2f} GiB"
    error = f"  error {row['relative_error']:.1e}" if "relative_error" in row else ""
    return f"{label} {row['ms']:10.3f} ms {row['tflops']:7.1f} TFLOP/s {memory} {row.get('implementation', '')}{error}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="default: 8,192 to 480,000")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; fewer of those that take over 100 ms")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/scaling.json, and none with --tiny")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--tiny", action="store_true", help="a toy, on a CPU too")
    parser.add_argument("--plot-only", type=Path, metavar="JSON", help="measure nothing, plot this file")
    options = parser.parse_args()
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/scaling.json"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
