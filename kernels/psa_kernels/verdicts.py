"""Outcomes of tests, kept from one process to the next, even if a test kills its process.

Each test has a JSON file in the user's cache folder. The file says "begun" before the test runs, and afterwards how it
ended. So a process that finds a test begun, and nobody running it, knows that it killed an earlier process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile

from filelock import FileLock, Timeout

BEGUN, PASSED, FAILED = "begun", "passed", "failed"
# How long a process waits for another one that runs the same test, which may take several compilations.
SECONDS = 600.0


class UntestedError(Exception):
    """A test could not be run, so that its outcome says nothing; the message says why in one line."""


def obstacle(key: Mapping[str, str], test: Callable[[], str | None]) -> str | None:
    """Why the thing that `test` tests must not be used, in one line, or None.

    The test runs only if no process has run it yet for the same key. A folder that cannot be read or written is no
    error: then this process keeps the outcome for itself.

    Args:
        key: all that the outcome depends on.
        test: returns None, or in one line what is wrong; raises `UntestedError`, or anything else if it fails.
    """
    path = _path(key)
    known = _read(path)
    if known is not None and known["outcome"] != BEGUN:
        return _told(known, path)
    try:
        with _alone(path):
            known = _read(path)
            if known is not None:
                return _told(known, path)
            return _run(key, test, path)
    except Timeout:
        return f"another process has not finished its self-test in {SECONDS:.0f} s"


def _run(key: Mapping[str, str], test: Callable[[], str | None], path: Path | None) -> str | None:
    _write(path, key, BEGUN)
    try:
        problem = test()
    except UntestedError as error:
        _remove(path)
        return str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    except BaseException:
        _remove(path)  # someone ended the process, not the test
        raise
    _write(path, key, PASSED if problem is None else FAILED, problem)
    return None if problem is None else f"its self-test failed: {problem}{_again(path)}"


def _told(known: Mapping[str, str], path: Path | None) -> str | None:
    """What an earlier process wrote down, as an obstacle."""
    if known["outcome"] == PASSED:
        return None
    if known["outcome"] == BEGUN:
        return f"an earlier process died in its self-test{_again(path)}"
    return f"its self-test failed: {known.get('problem')}{_again(path)}"


def _again(path: Path | None) -> str:
    return "" if path is None or not path.exists() else f"; to try again, remove {path}"


def _path(key: Mapping[str, str]) -> Path | None:
    """The file of a test; None for a user without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # relative ones are to be ignored, says the specification
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return base / "psa-diffusers" / "self-test" / f"{digest[:32]}.json"


def _read(path: Path | None) -> dict[str, str] | None:
    """What a file says, or None if there is none or it makes no sense."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path is not None else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("outcome") in (BEGUN, PASSED, FAILED) else None


def _write(path: Path | None, key: Mapping[str, str], outcome: str, problem: str | None = None) -> None:
    """Replace a file atomically, and flush it to disk, because the process may die right after."""
    if path is None:
        return
    partial = None
    try:
        with NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
            partial = Path(file.name)
            json.dump({"outcome": outcome, "problem": problem, **key}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        if partial is not None:
            _remove(partial)


def _remove(path: Path | None) -> None:
    try:
        if path is not None:
            path.unlink(missing_ok=True)
    except OSError:
        pass


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """Keep other processes from the same test meanwhile, where the folder allows it.

    Raises:
        Timeout: another one is at it for longer than `SECONDS`.
    """
    lock = None
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"), timeout=SECONDS)
            lock.acquire()
        except Timeout:
            raise
        except (OSError, NotImplementedError):
            lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
