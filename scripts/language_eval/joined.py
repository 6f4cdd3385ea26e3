"""Rows of several runs that were measured with the same settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kept_rows import Row

from psa_diffusers.errors import InputError


def joined(files: Sequence[Path]) -> tuple[Row, list[Row], bool]:
    """The settings of the files, their rows, each once, and whether all runs came to their ends.

    Args:
        files: the .jsonl files that runs keep beside the documents that they write.

    Raises:
        InputError: a file cannot be read or was measured with other settings.
    """
    settings: Row | None = None
    rows: dict[str, Row] = {}
    complete = True
    for file in files:
        try:
            # A line that a stopped run did not finish is no row.
            lines = [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            found, more = lines[0]["settings"], {row["id"]: row for row in lines[1:]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--join {file}: holds no rows of this script ({type(error).__name__})") from None
        settings = found if settings is None else settings
        for name in sorted({*settings, *found}):
            if settings.get(name) != found.get(name):
                other = f"but {files[0]} with {settings.get(name)!r}"
                raise InputError(f"--join {file}: measured with {name}={found.get(name)!r}, {other}")
        rows |= {name: row for name, row in more.items() if name not in rows}
        complete &= _came_to_its_end(file.with_suffix(".json"))
    assert settings is not None  # there is a file
    return settings, list(rows.values()), complete


def _came_to_its_end(document: Path) -> bool:
    """Whether the document of a run is there and says so."""
    try:
        return bool(json.loads(document.read_bytes())["complete"])
    except (OSError, ValueError, LookupError, TypeError):
        return False
