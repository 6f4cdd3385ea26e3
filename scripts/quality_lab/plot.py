"""An experiment as a picture: PSNR against density, or a line a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]

AXES = {"density": "density of the sparse steps", "density_run": "density of all steps"}


def plot(rows: list[Row], title: str, path: Path, *, axis: str | None) -> bool:
    """Writes a PNG, with PSNR against the density that `axis` names, if it names one.

    False where there is nothing to draw, or no matplotlib to draw with.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (7, 4.5) if axis else (7, 0.32 * len(rows) + 1.2)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    if axis:
        _curves(axes, rows, axis)
    else:
        _points(axes, rows)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _curves(axes: Any, rows: list[Row], axis: str) -> None:
    colours: dict[str, Any] = {}
    for series in dict.fromkeys(row["series"] for row in rows):
        points = sorted((row for row in rows if row["series"] == series), key=lambda row: row[axis])
        # Two series over the same content have the same colour, the second one is dashed.
        group = points[0]["content"] or series
        line = axes.errorbar(
            [row[axis] for row in points],
            [row["psnr"] for row in points],
            yerr=[row["psnr_ci"] or 0 for row in points],
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            linestyle="--" if group in colours else "-",
            color=colours.get(group),
            label=series,
        )
        colours[group] = line.lines[0].get_color()
    axes.set(xlabel=AXES[axis], ylabel="PSNR against dense (dB), 95 % interval")
    axes.legend(frameon=False, fontsize=8)


def _points(axes: Any, rows: list[Row]) -> None:
    """Settings from top to bottom, one colour a series, with their density."""
    series = list(dict.fromkeys(row["series"] for row in rows))
    spread = [row["psnr_ci"] or 0 for row in rows]
    lowest = min(row["psnr"] - ci for row, ci in zip(rows, spread, strict=True))
    highest = max(row["psnr"] + ci for row, ci in zip(rows, spread, strict=True))
    for place, (row, ci) in enumerate(zip(rows, spread, strict=True)):
        colour = f"C{series.index(row['series']) % 10}"
        axes.errorbar(row["psnr"], place, xerr=ci, fmt="o", markersize=5, capsize=3, color=colour)
        label = f"{row['psnr']:.2f} dB at density {row['density']:.3f}"
        axes.annotate(label, (highest, place), (10, 0), textcoords="offset points", va="center", fontsize=8)
    room = max(highest - lowest, 1.0)
    axes.set_xlim(lowest - 0.08 * room, highest + 0.55 * room)
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("PSNR against dense (dB), mean over prompts, 95 % interval")
    axes.grid(axis="x", linewidth=0.4)
