"""One process at a time in an output folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psa_diffusers.errors import InputError

# Who tries to lock a file empties it, so the owner's number stands in another.
LOCK_FILE, OWNER_FILE = ".lock", ".lock-owner"
# The library does not count a lock on a file that its last owner removed meanwhile, and tries again until then.
SECONDS, BETWEEN = 0.2, 0.02


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it ends.

    Where the file system has no locks, nothing is held.

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
            # Removed before the lock is: later they may be another run's.
            owner.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            lock.release()


def _named(owner: Path) -> str:
    try:
        return owner.read_text(encoding="ascii", errors="replace")[:20] or "unknown"
    except OSError:  # it has the lock and has not written its number yet, or is just ending
        return "unknown"
