"""How PSA does on video, images, speech and text: errors of attention at equal density, and the loss of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attention_judges.tables import METHODS, PLAIN
from figure_tables.source import Row, load, machine, origin, table

JUDGES, LANGUAGE = "quality/real-attention", "quality/language"
TITLES = {"demo": "video (the demo model)", "DINOv2-S": "images (DINOv2-S)", "Whisper": "speech (Whisper tiny.en)"}
SHOWN = (0.15, 0.25)  # densities of the table
SAID = 0.25  # that of the sentences
LEVEL = 0.1  # a ratio that is so near to 1 says that two are level
Curve = dict[float, float]  # by density


@dataclass(frozen=True)
class Panel:
    """One modality: curves of all methods, and of those that keep no blocks beside the rule's if there are any."""

    title: str
    curves: dict[str, Curve]
    free: dict[str, Curve]


def panels() -> list[Panel]:
    """Relative errors of attention outputs; text is there if it was measured, in the longest windows that were."""
    main = {"idea": None, **PLAIN, "own_order": True, "own_keys": True}
    found = []
    for judge, title in TITLES.items():
        ways = {method: main | way | {"judge": judge} for method, way in METHODS.items()}
        found.append(Panel(title, {method: _curve(JUDGES, way, "at_target") for method, way in ways.items()}, {}))
    tokens = longest("error")
    if tokens:
        kept, free = (
            {method: _curve(LANGUAGE, _of_text("error", tokens, method, kept), "error") for method in METHODS}
            for kept in (True, False)
        )
        found.append(Panel(text_title(tokens), kept, free))
    return found


def text_title(tokens: int) -> str:
    return f"text (SmolLM2-135M, {tokens:,} tokens)"


def longest(task: str) -> int | None:
    """Tokens of the longest windows in which a task was measured; None if it was not.

    Of errors those of which the sentences tell have to be there: a run that was stopped may have others alone.
    """
    rows = [row for row in load(LANGUAGE)["rows"] if row["task"] == task and row["method"] in METHODS]
    lengths = {row["tokens"] for row in rows}
    if task == "error":
        said = [row for row in rows if row["target"] == SAID and row["kept"]]
        for method in ("budget", "binary"):
            lengths &= {row["tokens"] for row in said if row["method"] == method}
    return max(lengths, default=None)


def loss_rows(tokens: int, method: str, kept: bool = True) -> list[Row]:
    """Rows of the loss over dense, by density."""
    rows = load(LANGUAGE)["rows"]
    found = [row for row in rows if _of_text("loss", tokens, method, kept).items() <= row.items()]
    return sorted(found, key=lambda row: row["target"])


def answer() -> str:
    """The answer in three sentences, as the files have it."""
    video, images, speech, *text = (_ratio(panel.curves) for panel in panels())
    pixels = max(video, images)
    said = [
        f"On video and images pooling {_verdict(pixels)}: at density {SAID:g} the rule `budget` errs {video:.2f} and "
        f"{images:.2f} times as much as binary blocks of the same density.",
        f"On speech it {_verdict(speech)}: {speech:.2f} times.",
    ]
    tokens = longest("loss")
    rises = {
        method: f"{row['excess']:.3f}{_interval(row['excess_ci'])}"
        for method in ("budget", "psa-3", "binary")
        for row in loss_rows(tokens or 0, method)
        if row["target"] == SAID
    }
    loss = ""
    if rises:
        loss = ", ".join(f"{rise} with `{method}`" for method, rise in rises.items())
        loss = f"the loss of a window of {tokens:,} tokens rises by {loss}, in nats a token"
    if text:
        said.append(f"On text it {_verdict(text[0])}: {text[0]:.2f} times{', and ' if loss else ''}{loss}.")
    else:
        said.append(f"On text errors were not measured yet{'; ' if loss else ''}{loss}.")
    return " ".join(said)


def errors() -> str:
    """Errors and loss of all methods at the densities shown; the least of each density is bold."""
    body = []
    for panel in panels():
        body.append([panel.title, *_cells(panel.curves)])
        if panel.free:
            body.append([f"{panel.title}, no blocks kept beside the rule's", *_cells(panel.free)])
    tokens = longest("loss")
    if tokens:
        for kept, name in ((True, ""), (False, ", no blocks kept beside the rule's")):
            curves = {}
            for method in METHODS:
                rows = loss_rows(tokens, method, kept)
                curves[method] = {row["target"]: row["excess"] for row in rows}
            if any(curves.values()):
                body.append([f"loss over dense, {text_title(tokens)}{name}", *_cells(curves)])
    head = ["", *(f"{method} {density:g}" for density in SHOWN for method in METHODS)]
    return table(head, body) + "\n\n" + "\n".join(_origins())


def needles() -> str:
    """How many needles the language model finds in the longest windows that were measured, by density."""
    tokens = longest("needle")
    if tokens is None:
        return "Needles were not measured yet."
    rows = [row for row in load(LANGUAGE)["rows"] if row["task"] == "needle" and row["tokens"] == tokens]
    densities = sorted({row["target"] for row in rows if row["target"] is not None})
    body: dict[tuple[str, ...], dict[float | None, str]] = {}
    for row in rows:
        way = row["method"], {True: "yes", False: "no", None: ""}[row["kept"]], str(row["dense_last"] or 0)
        way = way if row["target"] is not None else (row["method"], "", "")
        body.setdefault(way, {})[row["target"]] = f"{row['found']:.2f}{_interval(row['found_ci'], 2)}"
    head = [f"{tokens:,} tokens", "first and last kept", "dense last", *(f"at {density:g}" for density in densities)]
    lines = [[*way, *(cells.get(density, cells.get(None, "")) for density in densities)] for way, cells in body.items()]
    return table(head, lines)


def _origins() -> Iterator[str]:
    settings, rows = load(LANGUAGE)["settings"], load(LANGUAGE)["rows"]
    texts, (query, key) = max(row["texts"] for row in rows), settings["block"]
    yield f"Video, images and speech: [JSON](real-attention.json), on {machine(JUDGES)}, {origin(JUDGES)}."
    about = f"{texts} texts, blocks of {query} queries and {key} keys, {settings['dtype']}"
    yield f"Text: [JSON](language.json), {about}, on {machine(LANGUAGE)}, {origin(LANGUAGE)}."
    if load(LANGUAGE).get("note"):
        yield load(LANGUAGE)["note"]


def _of_text(task: str, tokens: int, method: str, kept: bool) -> Row:
    return {"task": task, "tokens": tokens, "method": method, "kept": kept}


def _curve(file: str, way: Row, figure: str) -> Curve:
    rows = [row for row in load(file)["rows"] if way.items() <= row.items()]
    return {row["target"]: row[figure] for row in sorted(rows, key=lambda row: row["target"])}


def _ratio(curves: dict[str, Curve]) -> float:
    return curves["budget"][SAID] / curves["binary"][SAID]


def _verdict(ratio: float) -> str:
    return "helps" if ratio < 1 - LEVEL else "hurts" if ratio > 1 + LEVEL else "neither helps nor hurts"


def _interval(half: float | None, digits: int = 3) -> str:
    return "" if half is None else f" ± {half:.{digits}f}"


def _cells(curves: dict[str, Curve]) -> Iterator[str]:
    for density in SHOWN:
        values = [curves[method].get(density) for method in METHODS]
        least = min((value for value in values if value is not None), default=None)
        yield from ("" if x is None else f"**{x:.3f}**" if x == least else f"{x:.3f}" for x in values)
