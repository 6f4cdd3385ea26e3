"""What is measured so far: a file of one JSON object a line, the settings first, which outlives a killed run."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from psa_diffusers.errors import InputError

Row = dict[str, Any]


class Record:
    """The file, open for one process alone while it is entered; each line is on the disk before the next begins.

    Args:
        path: of the file, made if it is not there.
        settings: what all lines are measured with, plain JSON.

    Raises:
        InputError: on entering: another process has it, it was begun with other settings, or it is no such file.
    """

    def __init__(self, path: Path, settings: Row) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._rows: dict[str, Row] = {}

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b")
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def add(self, row: Row) -> None:
        """Keep a row, whose `id` is its own."""
        assert row["id"] not in self._rows
        self._write(row)
        self._rows[row["id"]] = row

    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self._path}: another process writes it") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # a line that a killed run did not finish
            self._file.truncate(len(whole))
        lines = [self._parsed(line, number) for number, line in enumerate(whole.splitlines(), start=1)]
        if not lines:
            self._write({"settings": self._settings})
            return
        self._compare(lines[0].get("settings"))
        for number, row in enumerate(lines[1:], start=2):
            if not isinstance(row.get("id"), str) or row["id"] in self._rows:
                raise InputError(
                    f"{self._path}, line {number}: id={row.get('id')!r}; expected text that no other line has"
                )
            self._rows[row["id"]] = row

    def _parsed(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{self._path}, line {number}: is no JSON object; remove the line, and it is done anew")
        return row

    def _compare(self, known: Any) -> None:
        if not isinstance(known, dict):
            raise InputError(f"{self._path}, line 1: holds no settings; remove the file or give another --output")
        for name in sorted({*known, *self._settings}):
            if known.get(name) != self._settings.get(name):
                raise InputError(
                    f"{self._path} was begun with {name}={known.get(name)!r}, not {self._settings.get(name)!r}; remove "
                    "it or give another --output"
                )

    def _write(self, row: Row) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
