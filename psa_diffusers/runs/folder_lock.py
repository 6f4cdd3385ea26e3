"""One process at a time in an output folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psa_diffusers.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the system lets go of it when the process ends, however it ends.

    Raises:
        InputError: another process holds it.
    """
    descriptor = _hold(folder / LOCK_FILE, folder)
    try:
        yield
    finally:
        if descriptor is not None:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)


def _hold(path: Path, folder: Path) -> int | None:
    """An open, locked file; None where the system or the file system has no locks."""
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last owner may have removed the file between the two calls: that lock would keep nobody out.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise InputError(
                f"--output {folder}: another run (process {owner}) is writing there; wait for it, or choose another"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
