"""Rows that an earlier run of a benchmark wrote, to be completed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results, each with the commit that it was measured at.

    Raises:
        SystemExit: it is no such file.
    """
    try:
        result = json.loads(path.read_text())
        return [{**row, "commit": row.get("commit", result["commit"])} for row in result["rows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"--merge {path}: not a file of results: {type(error).__name__}: {error}") from None
