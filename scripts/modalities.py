"""What PSA does to video, images, speech and text: the plot of docs/quality/modalities.md, and the tables.

    python scripts/modalities.py      # after a new docs/quality/real-attention.json or language.json

Writes docs/quality/modalities.png, and all tables of the docs as `scripts/figures.py` does. Text has a panel of errors
once `scripts/eval_language.py --tasks error` measured them. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import figures
from attention_judges.plot import COLOURS
from attention_judges.tables import METHODS
from figure_tables.modalities import longest, loss_rows, panels, text_title

OUTPUT = Path(__file__).resolve().parents[1] / "docs/quality/modalities.png"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    plot(OUTPUT)
    for path, text in figures.stale().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path}: written")


def plot(path: Path) -> None:
    """Errors by density, a panel a modality on one axis, and beside them the loss of the language model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, tokens = panels(), longest("loss")
    count = len(found) + bool(tokens)
    figure, axes = pyplot.subplots(1, count, figsize=(3.2 * count, 3.6), squeeze=False, layout="constrained")
    most = max(max(curve.values()) for panel in found for curve in panel.curves.values() if curve)
    for axis, panel in zip(axes.flat, found, strict=False):
        for curves, style in ((panel.curves, "-"), (panel.free, ":")):
            for (method, curve), colour in zip(curves.items(), COLOURS, strict=False):
                label = method if style == "-" else None
                axis.plot(*_points(curve), linestyle=style, marker="o", markersize=4, color=colour, label=label)
        most = max([most, *(y for curve in panel.free.values() for y in curve.values())])
        _dress(axis, panel.title)
    for axis in axes.flat[: len(found)]:
        axis.set_ylim(0, 1.05 * most)
    axes.flat[0].set_ylabel("relative error of the attention's output")
    axes.flat[0].legend(frameon=False, fontsize=8)
    if tokens:
        _loss(axes.flat[-1], tokens)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _loss(axis: Any, tokens: int) -> None:
    for kept, style in ((True, "-"), (False, ":")):
        for index, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=True)):
            rows = loss_rows(tokens, method, kept)
            beside = 0.003 * (index - 1.5)  # so that no interval hides another
            places, values = [row["target"] + beside for row in rows], [row["excess"] for row in rows]
            halves = [row["excess_ci"] or 0 for row in rows]
            axis.errorbar(
                places,
                values,
                halves,
                linestyle=style,
                marker="o",
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                color=colour,
            )
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.set_ylabel("loss over dense, nats a token")
    _dress(axis, text_title(tokens))


def _points(curve: dict[float, float]) -> tuple[list[float], list[float]]:
    return list(curve), list(curve.values())


def _dress(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("density")
    axis.set_xticks([0.15, 0.25, 0.35])
    axis.set_xlim(0.13, 0.37)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
