"""Files that appear whole or not at all, and the names of those in a run's folder."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_diffusers.errors import InputError, printable

RUN_FILE = "run.json"
REPORT_FILE = "report.html"
PROMPT_FILE = "report.json"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` (same ending); rename it if all went well, remove it if not."""
    path = Path(path)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """The name under which `whole_file` has a file written."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def check_name(what: str, path: Path, longest: Path | None = None) -> None:
    """Refuse a path that no file can have, or that JSON and pages cannot hold. Nothing need be there.

    Args:
        what: its option in messages; empty for an argument.
        longest: the longest path that will be written for it.

    Raises:
        InputError: it is too long, or not UTF-8.
    """
    shown = f"{what} {printable(str(path))}".strip()
    try:
        str(path).encode()
        os.lstat((path if longest is None else longest).absolute())
    except UnicodeEncodeError:
        raise InputError(f"{shown}: the name is not UTF-8") from None
    except ValueError as error:  # a null byte
        raise InputError(f"{shown}: no file can have this name ({error})") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{shown}: the name is too long for this file system") from None


def check_output(output: Path, folder: Path) -> None:
    """Make the folder of `--output` if there is none, and see whether a file can be written there.

    Raises:
        InputError: it cannot.
    """
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written to ({error.strerror})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
