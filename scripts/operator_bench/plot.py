"""Speed-ups of whole calls as bars, one panel a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from operator_bench.tables import DENSITIES, METHODS, fastest_dense, nearest, whole_calls, workloads

Row = dict[str, Any]

# Ours stand out; dense peers are grey.
COLOURS = dict(
    zip(
        METHODS,
        (
            "#c9ccd1",
            "#a3a8b0",
            "#7c828c",
            "#8fc1b5",
            "#d9a55b",
            "#c98a3a",
            "#c58fae",
            "#6c9bd2",
            "#1f4e8c",
            "#44679c",
            "#3a7fa0",
            "#0b1f3f",
        ),
        strict=True,
    )
)
BAR_INCHES = 0.2
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def plot(rows: list[Row], path: Path) -> None:
    """Writes a PNG; nothing where no whole call of a workload ran beside a dense one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = [name for name in workloads(rows) if fastest_dense(rows, name)]
    if not names:
        return
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    most = max(len(whole_calls(rows, name)) for name in names) + len(DENSITIES)
    size = (7 * columns, (most * BAR_INCHES + 1) * lines + 0.6)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[len(names) :]:
        panel.remove()
    for panel, name in zip(panels.flat, names, strict=False):
        _draw(panel, rows, name)
    used = [method for method in METHODS if any(row["method"] == method and "ms" in row for row in rows)]
    patches = [Patch(color=COLOURS[method], label=method) for method in used]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(used), frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(panel: Any, rows: list[Row], workload: str) -> None:
    """Bars from top to bottom, grouped by density, the fastest of a group last."""
    calls, base = whole_calls(rows, workload), fastest_dense(rows, workload)
    place, ticks, longest = 0.0, [], max(base["ms"] / row["ms"] for row in calls)
    for density in DENSITIES:
        group = sorted((row for row in calls if nearest(row["density"]) == density), key=lambda row: -row["ms"])
        if not group:
            continue
        ticks.append((place + (len(group) - 1) / 2, "dense" if density == 1 else f"{density:.2f}"))
        for row in group:
            speedup = base["ms"] / row["ms"]
            panel.barh(place, speedup, height=0.85, color=COLOURS.get(row["method"], "black"))
            label = f"{speedup:.1f}x  {row['ms']:.3g} ms"
            panel.text(speedup + longest * 0.01, place, label, va="center", fontsize=8, bbox=LABEL_BOX)
            place += 1
        place += 0.8
    panel.axvline(1, color="black", linewidth=0.7, linestyle=":", zorder=0)
    panel.set_xlim(0, longest * 1.25)
    panel.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    panel.set(title=workload, ylabel="density", xlabel=f"times as fast as {base['method']}, whole call")
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
