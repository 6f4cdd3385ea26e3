"""Time and memory against the number of tokens, a line a method and density."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PANELS = (("ms", "ms, whole call"), ("extra_gib", "GiB beyond the inputs, peak"))
GREYS = ("#7c828c", "#a3a8b0", "#c9ccd1")
BLUES = ("#1f4e8c", "#6c9bd2", "#a9c5e8")


def plot(rows: list[Row], path: Path) -> bool:
    """Writes a PNG of the rows with the fewest heads; False where there is no matplotlib to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heads = min(row["heads"] for row in rows)
    lines = _lines([row for row in rows if row["heads"] == heads])
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 4.3), layout="constrained")
    for panel, (figure_name, label) in zip(panels, PANELS, strict=True):
        for name, (colour, points) in lines.items():
            # A CPU tells no memory, and 0 has no place on a logarithmic axis.
            shown = [row for row in points if row[figure_name]]
            values = [row[figure_name] for row in shown]
            panel.loglog([row["tokens"] for row in shown], values, "o-", markersize=4, color=colour, label=name)
        ticks = sorted({row["tokens"] for row in rows})
        panel.set_xticks(ticks, [f"{tick / 1000:.0f}k" for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel=f"tokens ({heads} heads)", ylabel=label)
        panel.grid(linewidth=0.4)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _lines(rows: list[Row]) -> dict[str, tuple[str, list[Row]]]:
    """Name, colour and measured points of every line: dense peers grey, ours blue, darkest where sparsest."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = f"psa, density {row['asked']:.2f}" if row["method"] == "psa" else f"{row['method']}, dense"
        if "ms" in row:
            found.setdefault(name, []).append(row)
    greys, blues = iter(GREYS), iter(BLUES)
    return {name: (next(blues if name.startswith("psa") else greys), points) for name, points in found.items()}
