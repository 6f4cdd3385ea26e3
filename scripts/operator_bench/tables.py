"""Rows of a run as Markdown tables: whole calls beside their peers, and the operator's stages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from operator_bench.workloads import THRESHOLDS

Row = dict[str, Any]

DENSITIES = (1.0, *THRESHOLDS)
INT8 = "psa-hopper-int8"
METHODS = (
    "sdpa-fa2",
    "sdpa-cudnn",
    "fa3",
    "flex",
    "sol-attn",
    "sol-int8",
    "psa-authors",
    "psa-triton",
    "psa-hopper",
    "psa-hopper-hilbert",
    "psa-triton-int8",
    INT8,
)
DENSE = ("sdpa-fa2", "sdpa-cudnn", "fa3")
STAGES = ("pyramid", "importance", "prices", "allocation", "quantise", "attention", "total")


def report(result: dict[str, Any]) -> str:
    """The whole page."""
    rows = result["rows"]
    parts = [_head(result)]
    parts += [f"## {name}\n\n{workload_table(rows, name)}" for name in workloads(rows)]
    parts.append(f"## Stages of the operator, in ms\n\n{stage_table(rows)}")
    failed = [f"- {row['workload']}, {row['method']}, {row['stage']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        parts.append("## Did not run\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def workloads(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["workload"] for row in rows))


def whole_calls(rows: Iterable[Row], workload: str) -> list[Row]:
    """The rows of whole calls that ran."""
    return [row for row in rows if row["workload"] == workload and row["stage"] == "total" and "ms" in row]


def fastest_dense(rows: Iterable[Row], workload: str) -> Row | None:
    """The dense peer that speed-ups compare with."""
    dense = [row for row in whole_calls(rows, workload) if row["method"] in DENSE]
    return min(dense, key=lambda row: row["ms"], default=None)


def nearest(density: float) -> float:
    """The density asked for that a measured one stands for: lists hold whole blocks, so theirs is a little off."""
    return min(DENSITIES, key=lambda asked: abs(asked - density))


def workload_table(rows: list[Row], workload: str) -> str:
    """Methods by densities: ms, and the speed-up over the fastest dense peer of the same run."""
    calls, base = whole_calls(rows, workload), fastest_dense(rows, workload)
    cells: dict[str, dict[float, list[str]]] = {}
    for row in calls:
        cells.setdefault(row["method"], {}).setdefault(nearest(row["density"]), []).append(_cell(row, base))
    body = []
    for method in _ordered(cells):
        extra = max(row["extra_gib"] for row in calls if row["method"] == method)
        body.append([method, *("; ".join(cells[method].get(density, [])) for density in DENSITIES), f"{extra:.2f}"])
    titles = ["dense" if density == 1 else f"density {density:.2f}" for density in DENSITIES]
    return _table(["method", *titles, "extra GiB"], body)


def stage_table(rows: list[Row]) -> str:
    """Workloads, densities and our methods by stages."""
    found: dict[tuple[str, float, str], dict[str, Row]] = {}
    for row in rows:
        if row["method"].startswith("psa-") and row["method"] != "psa-authors" and "ms" in row:
            key = (row["workload"], row["density"], row["method"])
            found.setdefault(key, {})[row["stage"]] = row
    body = []
    for (workload, density, method), stages in found.items():
        if "attention" not in stages:
            continue
        times = [f"{stages[stage]['ms']:.3f}" if stage in stages else "" for stage in STAGES]
        tflops = f"{stages['attention']['tflops']:.0f}" if "attention" in stages else ""
        extra = f"{stages['total']['extra_gib']:.2f}" if "total" in stages else ""
        body.append([workload, f"{density:.4f}", method, *times, tflops, extra])
    return _table(["workload", "density", "method", *STAGES, "attention TFLOP/s", "extra GiB"], body)


def _head(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    later = {row["workload"]: row["commit"] for row in result["rows"] if "commit" in row}
    commits = ", ".join([result["commit"], *(f"for {name} {commit}" for name, commit in later.items())])
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"# The operator\n\n{hardware.get('gpu', hardware['processor'])}, {software}, commit {commits}, "
        f"{result['date']}. bf16, random data, medians; importance {result['importance']}, key block "
        f"{result['block_key']}.\n\nTimes of whole calls in ms and, in brackets, how many times as fast as the fastest "
        "dense peer of this run. A density is that of the lists; where it is off by more than 5% it is given. "
        "TFLOP/s: density x dense FLOPs / time. Extra GiB: peak memory beyond the inputs, output included, the largest "
        "of a row. Block masks are given to FlexAttention for free."
    )


def _cell(row: Row, base: Row | None) -> str:
    asked = nearest(row["density"])
    speedup = "" if base is None else f" ({base['ms'] / row['ms']:.2f}x)"
    off = f" at {row['density']:.3f}" if abs(row["density"] / asked - 1) > 0.05 else ""
    return f"{row['ms']:.{3 if row['ms'] < 10 else 1}f}{speedup}{off}"


def _ordered(methods: Iterable[str]) -> list[str]:
    return sorted(methods, key=lambda method: METHODS.index(method) if method in METHODS else len(METHODS))


def _table(head: list[str], body: list[list[str]]) -> str:
    """Columns are padded, so that it reads well as plain text too."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
