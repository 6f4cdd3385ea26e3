"""One run at a time in an output folder."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from psa_diffusers.errors import InputError
from psa_diffusers.runs.folder_lock import LOCK_FILE, OWNER_FILE, locked

HOLD = "import sys, time; from pathlib import Path; from psa_diffusers.runs.folder_lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_by_name(tmp_path, holder):
    with pytest.raises(InputError, match=rf"another run \(process {holder.pid}\) is writing there"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / OWNER_FILE).read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_it_is_let_go_of_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path), pytest.raises(InputError, match="another run"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, its last owner ends."""
    import fcntl

    flock, calls = fcntl.flock, []

    def removed_first(descriptor, how):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(time.monotonic())
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(tmp_path):
        assert len(calls) >= 2 and (tmp_path / LOCK_FILE).exists()
        with pytest.raises(InputError, match="another run"), locked(tmp_path):
            pass


def test_a_lock_file_that_another_process_made_anew_meanwhile_is_its_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, its last owner ends and a next one takes the folder."""
    import fcntl

    flock, held = fcntl.flock, []

    def taken_first(descriptor, how):
        if not held:
            (tmp_path / LOCK_FILE).unlink()
            held.append(os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT))
            flock(held[0], fcntl.LOCK_EX)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", taken_first)
    with pytest.raises(InputError, match="another run"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).exists()
    os.close(held[0])


def test_a_process_that_has_not_written_its_number_yet_is_unknown(tmp_path, holder):
    (tmp_path / OWNER_FILE).unlink()
    with pytest.raises(InputError, match=r"another run \(process unknown\) is writing there"), locked(tmp_path):
        pass


def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch):
    import fcntl

    def flock(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        assert not (tmp_path / OWNER_FILE).exists()
    with pytest.raises(ZeroDivisionError) as caught, locked(tmp_path):
        raise ZeroDivisionError
    assert caught.value.__context__ is None  # it is not told as what came of the missing lock
