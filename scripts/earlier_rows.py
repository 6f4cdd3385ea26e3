"""Rows that an earlier run of a benchmark wrote, to be completed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from psa_diffusers.environment import hardware


def read_rows(merge: Path | None, output: Path | None, device: str) -> list[dict[str, Any]]:
    """The rows of the file to complete, each with the commit that it was measured at; none without such a file.

    Raises:
        SystemExit: it is no file of results, or was measured on another GPU; or the output exists and is another file,
            whose rows would be lost.
    """
    if output is not None and output.exists() and (merge is None or not output.samefile(merge)):
        raise SystemExit(f"--output {output}: exists; --merge {output} keeps its rows, or name another file")
    if merge is None:
        return []
    try:
        result = json.loads(merge.read_text())
        rows = [{**row, "commit": row.get("commit", result["commit"])} for row in result["rows"]]
        earlier, here = result["hardware"].get("gpu"), hardware(device).get("gpu")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(f"--merge {merge}: not a file of results: {type(error).__name__}: {error}") from None
    if earlier != here:
        raise SystemExit(f"--merge {merge}: measured on {earlier or 'a CPU'}, not on {here or 'a CPU'}")
    return rows
