"""Error by density, a panel a judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention_judges.tables import METHODS, PLAIN

COLOURS = ("#7c828c", "#6c9bd2", "#d9a55b", "#1f4e8c")


def plot(rows: Sequence[dict[str, Any]], judges: Sequence[str], path: Path) -> None:
    """Writes a PNG: the rules in the judge's own order, and where there are others those in raster order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(judges), figsize=(4 * len(judges), 4), squeeze=False, layout="constrained")
    for panel, judge in zip(panels.flat, judges, strict=True):
        for (name, way), colour in zip(METHODS.items(), COLOURS, strict=True):
            for own, style in ((True, "-"), (False, ":")):
                wanted = {"judge": judge, "idea": None, **PLAIN, **way, "own_order": own, "own_keys": True}
                if not own:
                    wanted["order"] = "raster"
                found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
                found.sort(key=lambda row: row["target"])
                label = f"{name}, {found[0]['order']}" if found else None
                panel.plot(
                    [row["target"] for row in found],
                    [row["at_target"] for row in found],
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=label,
                )
        panel.set_title(judge, fontsize=10)
        panel.set_xlabel("density")
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    panels.flat[0].set_ylabel("relative error of the attention's output")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
