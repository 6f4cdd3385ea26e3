"""A lock that lets only one process at a time into an output folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psa_diffusers.errors import InputError

# A process that tries to lock a file empties it, so the owner's process number is in another file.
LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner"
# If the last owner removed the lock's file meanwhile, the library discards that lock and tries again until the timeout.
SECONDS, BETWEEN = 0.2, 0.02


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process; the system frees the lock when the process ends, however it ends.

    On a file system without locks nothing is locked.

    Raises:
        InputError: another process holds it.
    """
    from filelock import FileLock, Timeout

    path, owner = folder / LOCK_FILE, folder / OWNER_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=SECONDS, poll_interval=BETWEEN)
    except Timeout:
        raise InputError(
            f"--output {folder}: another run (process {_named(owner)}) is writing there; wait for it, or choose another"
        ) from None
    except (NotImplementedError, OSError):
        held = False
    else:
        held = True
    try:
        if held:
            owner.write_text(str(os.getpid()), encoding="ascii")
        yield
    finally:
        if held:
            # Remove the files before the lock is released: afterwards they may belong to another run.
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            lock.release()


def _named(owner: Path) -> str:
    try:
        return owner.read_text(encoding="ascii", errors="replace")[:20] or "unknown"
    except OSError:  # the owner has not written its number yet, or is just ending
        return "unknown"
