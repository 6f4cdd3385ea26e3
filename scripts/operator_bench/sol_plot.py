"""Quality against milliseconds: errors of single calls on the left, PSNR of videos on the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figure_tables.sol import METHODS, Point

# PSA is blue and green, Sol-Attn red and orange.
COLOURS = dict(
    zip(
        (method.title for method in METHODS),
        ("#6c9bd2", "#1f4e8c", "#5a9c7c", "#a3a8b0", "#d9a55b", "#b3382c", "#d97a5b"),
        strict=True,
    )
)


def plot(points: list[Point], path: Path) -> bool:
    """Writes a PNG; False where there is no matplotlib to draw with."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _lines(left, points, "error")
    left.set(ylabel="relative error of single calls, lower is better", yscale="log")
    values = [0.07, 0.1, 0.15, 0.2, 0.3]
    left.set_yticks(values, [f"{value:g}" for value in values])
    left.minorticks_off()
    _lines(right, points, "psnr")
    right.set(ylabel="PSNR of videos (dB), higher is better")
    if all(point.psnr is None for point in points):
        right.text(0.5, 0.5, "not measured yet", ha="center", transform=right.transAxes)
        right.set(xlim=left.get_xlim(), yticks=[])
    for axes in (left, right):
        axes.set_xlabel("ms of a whole call at the size of Wan2.1-14B 720p")
        axes.grid(linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: line for axes in (left, right) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _lines(axes: Any, points: list[Point], figure: str) -> None:
    """A line a method, with the setting at each point."""
    for title, colour in COLOURS.items():
        shown = [x for x in points if x.method.title == title and x.ms is not None and getattr(x, figure) is not None]
        if not shown:
            continue
        shown.sort(key=lambda point: point.ms)
        values = [getattr(point, figure) for point in shown]
        times = [point.ms for point in shown]
        spread = [point.psnr_ci or 0 for point in shown] if figure == "psnr" else None
        label = title.replace("`", "") + (", its correction takes 2 ms more" if title == "`psa-auto`" else "")
        style = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.2}
        axes.errorbar(times, values, yerr=spread, color=colour, label=label, **style)
        for point, at, value in zip(shown, times, values, strict=True):
            below = title.endswith("tau")
            place = {"xytext": (4, -10 if below else 4), "textcoords": "offset points"}
            setting = f"tau {point.setting:g}" if below else f"{point.setting:g}"
            axes.annotate(setting, (at, value), fontsize=7, color=colour, **place)
