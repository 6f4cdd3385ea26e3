"""Measured rows: where they are, how one is found, and how figures are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
OFF = 0.06  # relative: lists hold whole blocks, so that a measured density is a little off the one asked for
Row = dict[str, Any]


@cache
def load(name: str) -> dict[str, Any]:
    """The document of docs/<name>.json."""
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))


def find(file: str, /, *, density: float | None = None, **given: Any) -> Row | None:
    """The row of docs/<file>.json with these entries that was measured; the last one if a case was measured again.

    Args:
        density: the one asked for, which a measured one may miss by 6 %.
    """
    rows = [row for row in load(file)["rows"] if all(row.get(key) == value for key, value in given.items())]
    if density is not None:
        rows = [row for row in rows if abs(row["density"] / density - 1) <= OFF]
    rows = [row for row in rows if "error" not in row or isinstance(row["error"], float)]
    return rows[-1] if rows else None


def need(file: str, /, **given: Any) -> Row:
    """As `find`, for a row that a table cannot be without.

    Raises:
        LookupError: there is no such row.
    """
    row = find(file, **given)
    if row is None:
        raise LookupError(f"docs/{file}.json has no measured row with {given}")
    return row


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def duration(ms: float) -> str:
    """Milliseconds, or seconds from one on."""
    return f"{digits(ms)} ms" if ms < 1000 else f"{digits(ms / 1000)} s"


def times(ms: float, dense: float) -> str:
    """A duration, and how many times as fast it is as another."""
    return f"{duration(ms)} ({dense / ms:.1f}x)"


def machine(name: str) -> str:
    """The GPU that a file was measured on, or the processor where there was none, with its number of cores."""
    hardware = load(name)["hardware"]
    return f"one {hardware['gpu']}" if "gpu" in hardware else f"{hardware['cores']} cores of an {hardware['processor']}"


def gpu_of(name: str, row: Row) -> str:
    """The GPU of a row: its own where a file has rows of several machines, else that of the file."""
    return row.get("gpu") or load(name)["hardware"].get("gpu", "CPU")


def commits_of(rows: Iterable[Row]) -> str:
    """The commits that rows were measured at, each once."""
    commits = dict.fromkeys(row["commit"] for row in rows)
    return f"commit{'s' * (len(commits) > 1)} {' and '.join(commits)}"


def origin(name: str) -> str:
    """Commit and date of a file."""
    return f"commit {load(name)['commit']}, {load(name)['date']}"
