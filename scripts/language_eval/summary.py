"""Rows of single texts become one row a way, with intervals, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

from psa_diffusers.calibrate.intervals import half_interval

Row = dict[str, Any]
FIGURES = {"loss": ("excess", "excess_all", "loss"), "error": ("error",), "needle": ("found", "excess", "loss")}
WAY = ("task", "tokens", "method", "kept", "target", "dense_last")


def summed_up(rows: Iterable[Row]) -> list[Row]:
    """One row for all texts of a way, in the order in which ways come.

    Args:
        rows: of `eval_language`: with the keys of `WAY`, `text`, and figures.

    Returns:
        Rows with the means over texts and `_ci`, half their 95 % intervals over texts; of `excess`, the loss over
        dense, `error`, that of attention outputs, and `found`, the share of needles found, also those of each text.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in WAY), []).append(row)
    return [dict(zip(WAY, key, strict=True)) | _figures(found) for key, found in groups.items()]


def _figures(rows: Sequence[Row]) -> Row:
    texts = list(dict.fromkeys(row["text"] for row in rows))
    done: Row = {"texts": len(texts)}
    densities = [row["density"] for row in rows if row["density"] is not None]
    done["density"] = round(mean(densities), 4) if densities else None
    for name in ("excess", "excess_all", "loss", "error", "found"):
        if name not in rows[0]:
            continue
        each = [mean(float(row[name]) for row in rows if row["text"] == text) for text in texts]
        done |= {name: round(mean(each), 5), f"{name}_ci": half_interval(each)}
        if name in ("excess", "error", "found"):
            done[f"{name}_each"] = {text: round(value, 5) for text, value in zip(texts, each, strict=True)}
    if "depth" in rows[0]:
        depths = sorted({row["depth"] for row in rows})
        done["found_at"] = {
            str(at): round(mean(row["found"] for row in rows if row["depth"] == at), 4) for at in depths
        }
    return done


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, a table a task."""
    lines: list[str] = []
    for task, names in FIGURES.items():
        some = [row for row in rows if row["task"] == task]
        if some:
            head = ["tokens", "method", "first and last kept", "dense last", "aimed at", "density", *names, "texts"]
            lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
            lines += [_line(row, names) for row in some]
    return lines


def _line(row: Row, names: Sequence[str]) -> str:
    kept = {True: "yes", False: "no"}.get(row["kept"], "")
    cells = [row["tokens"], row["method"], kept, row["dense_last"], row["target"], row["density"]]
    for name in names:
        interval = row.get(f"{name}_ci")
        value = "" if row.get(name) is None else f"{row[name]:.4f}"
        cells.append(value + (f" ± {interval:.4f}" if interval is not None else ""))
    return f"| {' | '.join('' if cell is None else str(cell) for cell in [*cells, row['texts']])} |"
