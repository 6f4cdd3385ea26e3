"""Time the operator, stage by stage, beside dense and other sparse attention: `python scripts/bench_operator.py`.

Needs a CUDA device, PyTorch and Triton; a peer that is not importable is skipped. Inputs are random, so importance is
flat and every list is as long as its preset says. Times are medians of calls enqueued back to back; the extra memory
is the peak beyond the inputs, with the output counted; TFLOP/s are density x dense FLOPs / time, with the density of
the lists. Writes JSON (hardware, versions, commit, rows) and, beside it, tables as .md and a plot as .png, which
`--tables-only` makes again from the JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from operator_bench import ours, peers
from operator_bench.plot import plot
from operator_bench.tables import report
from operator_bench.timing import rows_of
from operator_bench.workloads import WORKLOADS, Case, Workload
from results import document, write

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = _arguments()
    if options.tables_only:
        show(json.loads(options.tables_only.read_text()), options.tables_only)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_operator: no CUDA device")
    if options.compile_only:
        for workload in _chosen(options):
            compile_all(workload, options)
        return
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for workload in _chosen(options):
        for row in measure(workload, options):
            rows.append(row)
            print(_line(row), flush=True)
        # Written after each workload: a call that breaks the device ends the process.
        result = _result(rows, options)
        write(result, options.output)
    show(result, options.output)


def measure(workload: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all methods on one workload."""
    for case in cases(workload, options):
        yield from rows_of(case, workload, options.repeats)


def compile_all(workload: Workload, options: argparse.Namespace) -> None:
    """Make every call once, so that the compilers' caches on disk are full; a call that fails is left to the run."""
    for case in cases(workload, options):
        try:
            case.call()
        except Exception as error:
            print(f"{workload.name} {case.methods[0]}: {type(error).__name__}", flush=True)
    torch.cuda.synchronize()


def cases(workload: Workload, options: argparse.Namespace) -> Iterator[Case]:
    """Everything that is timed on one workload."""
    torch.manual_seed(0)
    shape = (1, workload.tokens, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    yield from peers.dense_cases(q, k, v)
    yield from ours.cases(q, k, v, workload, options)
    yield from peers.sparse_cases(q, k, v)


def show(result: dict[str, Any], output: Path) -> None:
    """Print the tables, and write them and the plot beside the JSON."""
    text = report(result)
    output.with_suffix(".md").write_text(text)
    if importlib.util.find_spec("matplotlib"):
        plot(result["rows"], output.with_suffix(".png"))
    print(text)


def _result(rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    what = "the operator, stage by stage, random data, bf16, medians"
    importance = ours.describe(ours.specs(options)[0].importance)
    settings = {
        "rule": options.rule,
        "precision": options.precision,
        "block_key": options.block_key,
        "importance": importance,
        "repeats": options.repeats,
    }
    return document(what, rows, device="cuda", commit=options.commit, peers=peers.versions(), **settings)


def _chosen(options: argparse.Namespace) -> list[Workload]:
    return [workload for workload in WORKLOADS if options.workload in (None, workload.name)]


def _line(row: dict[str, Any]) -> str:
    density = "" if row["density"] is None else f"{row['density']:.4f}"
    label = f"{row['workload']:18} {row['method']:11} {density:6} {row['stage']:10}"
    if "error" in row:
        return f"{label} {row['error']}"
    tflops = "" if row["tflops"] is None else f"{row['tflops']:7.1f} TFLOP/s"
    return f"{label} {row['ms']:9.3f} ms {tflops:15} {row['extra_gib']:6.2f} GiB"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=[workload.name for workload in WORKLOADS], help="default: all")
    parser.add_argument("--block-key", type=int, default=64)
    parser.add_argument("--rule", choices=("count", "budget"), default="count", help="default: count")
    parser.add_argument(
        "--precision",
        choices=("native", "int8_qk"),
        default="native",
        help="int8_qk: the kernels in 8-bit integers too, beside themselves in bf16; default: native",
    )
    parser.add_argument("--estimator", choices=("sampled", "pooled"), help="default: the operator's, as for strides")
    parser.add_argument("--statistic", choices=("max", "mean"), help="default: the operator's")
    parser.add_argument("--query-stride", type=int)
    parser.add_argument("--key-stride", type=int)
    parser.add_argument("--repeats", type=int, default=7, help="timed calls; fewer of those that take over 100 ms")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/operator.json")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--compile-only", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--tables-only", type=Path, metavar="JSON", help="measure nothing, show this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
