"""What pytest says at its end of the tests that were skipped: one line a reason instead of one a place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

MOST_FILES = 3


def skip_table(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """The lines of a table: how many, why, and in which files; the most frequent reason first.

    Args:
        skipped: of each test, its file and the reason.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for file, reason in skipped:
        found[" ".join(re.sub(r"^Skipped: ", "", reason).split())].append(PurePosixPath(file).name)
    rows = sorted(found.items(), key=lambda row: (-len(row[1]), row[0]))
    width = max((len(reason) for reason in found), default=0)
    return [f"{len(files):5}  {reason.ljust(width)}  {_names(files)}" for reason, files in rows]


def _names(files: list[str]) -> str:
    names = sorted(set(files))
    more = len(names) - MOST_FILES
    return ", ".join(names[:MOST_FILES]) + (f" and {more} more" if more > 0 else "")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A hook of pytest; tests/conftest.py has it."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [(report.nodeid.split("::")[0], _reason(report)) for report in reports]
    if reasons:
        terminalreporter.write_sep("=", f"{len(reasons)} skipped, and why")
        for line in skip_table(reasons):
            terminalreporter.write_line(line)


def _reason(report: Any) -> str:
    told = report.longrepr
    return str(told[2] if isinstance(told, tuple) else told)
