"""Merged tiles against one block at a time: a table of times, and bars of speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {"naive": "#a3a8b0", "psa-triton": "#6c9bd2", "psa-hopper": "#1f4e8c"}


def table(rows: list[Row]) -> str:
    """Milliseconds, and how many times as fast as the naive kernel on the same lists."""
    lines = []
    for (workload, block_key, pyramid), calls in _groups(rows, "workload", "block_key", "pyramid").items():
        times = {row["method"]: row["ms"] for row in calls if "ms" in row}
        cells = [f"{method} {ms:8.3f} ms{_speedup(times, method):>9}" for method, ms in times.items()]
        lines.append(f"{workload:18} {block_key:4} {pyramid:11} density {calls[0]['density']:.3f}  " + "  ".join(cells))
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> bool:
    """Writes a PNG with a panel for each workload and block size; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _groups([row for row in rows if "ms" in row], "workload", "block_key")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((workload, block_key), calls) in zip(axes.flat, panels.items(), strict=False):
        _draw(axis, calls)
        axis.set_title(f"{workload}, blocks of {block_key} keys", fontsize=10)
    axes.flat[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw(axis: Any, rows: list[Row]) -> None:
    pyramids = _groups(rows, "pyramid")
    methods = [method for method in COLOURS if any(row["method"] == method for row in rows)]
    width = 0.8 / len(methods)
    for place, calls in enumerate(pyramids.values()):
        times = {row["method"]: row["ms"] for row in calls}
        for row in calls:
            index = methods.index(row["method"])
            at = place + (index - (len(methods) - 1) / 2) * width
            label = row["method"] if place == 0 else None
            axis.bar(at, row["tflops"], 0.95 * width, color=COLOURS[row["method"]], label=label)
            speedup = _speedup(times, row["method"]).strip(" ()")
            axis.text(at, row["tflops"], speedup, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(pyramids)), [name for (name,) in pyramids], fontsize=8)
    axis.set_ylim(0, 1.25 * max(row["tflops"] for row in rows))
    axis.set_ylabel("TFLOP/s (density x dense / time)", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _speedup(times: dict[str, float], method: str) -> str:
    return "" if method == "naive" or "naive" not in times else f" ({times['naive'] / times[method]:.2f}x)"


def _groups(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups
