"""The JSON document of an experiment, which several processes may add their settings to."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from quality_lab.figures import paired
from results import document, head, write

from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.errors import InputError

Row = dict[str, Any]


class Store:
    """One experiment's file. `conditions` are what all of its rows were measured under, `names` its settings in order.

    Raises:
        InputError: the file holds rows measured under other conditions, or is no such document.
    """

    def __init__(
        self, path: Path, what: str, conditions: Row, names: Sequence[str], *, device: str, commit: str | None = None
    ) -> None:
        self.path, self._what, self._conditions, self._names = path, what, conditions, list(names)
        self._device, self._commit = device, commit or head()
        self.rows()

    def rows(self) -> list[Row]:
        """What is measured so far, in the experiment's order."""
        return self._read().get("rows", [])

    def add(self, row: Row, dense: Row) -> Row:
        """Add one row and what is known of the dense videos, complete all rows, and return the new one completed."""
        row = {**row, "commit": self._commit}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.parent):
            known = self._read()
            rows = {old["setting"]: old for old in known.get("rows", [])} | {row["setting"]: row}
            rows = complete([rows[name] for name in self._names if name in rows])
            settings = {"dense": known.get("dense", {}) | dense, "settings": len(self._names), **self._conditions}
            result = document(self._what, rows, device=self._device, commit=self._commit, **settings)
            fresh = self.path.with_suffix(".tmp")
            write(result, fresh)
            os.replace(fresh, self.path)
        return next(old for old in rows if old["setting"] == row["setting"])

    def _read(self) -> Row:
        if not self.path.exists():
            return {}
        known = read(self.path)
        for key, value in self._conditions.items():
            if known.get(key) != value:
                raise InputError(
                    f"{self.path} was measured with {key}={known.get(key)!r}, not {value!r}; remove it or give another "
                    "--output"
                )
        return known


def read(path: Path) -> Row:
    """The document at a path.

    Raises:
        InputError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or "rows" not in found:
        raise InputError(f"{path}: holds no results")
    return found


def complete(rows: Sequence[Row]) -> list[Row]:
    """Rows with what follows from their PSNR of each prompt; the difference needs the baseline's row."""
    each = {row["setting"]: row["psnr_each"] for row in rows}
    done = []
    for row in rows:
        delta, delta_ci = paired(row["psnr_each"], each[row["against"]]) if row["against"] in each else (None, None)
        figures = {"psnr": round(mean(row["psnr_each"]), 4), "psnr_ci": half_interval(row["psnr_each"])}
        done.append({**row, **figures, "delta_psnr": delta, "delta_ci": delta_ci})
    return done


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Other processes wait; the lock is on the folder, which needs no file for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
