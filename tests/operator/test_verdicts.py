"""Outcomes of tests that are kept from one process to the next."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from psa_kernels import verdicts
from psa_kernels.verdicts import UntestedError, obstacle

KEY = {"triton": "9.9.0", "gpu": "a GPU"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "psa-diffusers" / "self-test"


def not_again():
    raise AssertionError("tested again")


def in_a_process(function, *arguments):
    """Run it in another process; how that ended."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(30)
    return process.exitcode


def test_what_passed_is_not_tested_again(folder):
    assert obstacle(KEY, lambda: None) is None
    assert obstacle(KEY, not_again) is None
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text()) == {"outcome": "passed", "problem": None, **KEY}
    assert "tested again" in obstacle({**KEY, "triton": "9.9.1"}, not_again)


def test_what_failed_says_why_and_how_to_try_again(folder):
    told = obstacle(KEY, lambda: "numbers are wrong")
    (file,) = folder.glob("*.json")
    assert told == f"its self-test failed: numbers are wrong; to try again, remove {file}"
    assert obstacle(KEY, not_again) == told
    file.unlink()
    assert obstacle(KEY, lambda: None) is None


def test_what_raises_has_failed_in_one_line():
    def broken():
        raise RuntimeError("no such\n  instruction")

    assert obstacle(KEY, broken).startswith("its self-test failed: RuntimeError: no such instruction; to try again")
    assert "no such instruction" in obstacle(KEY, not_again)


@pytest.mark.parametrize("error", [UntestedError("no memory"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_what_was_not_tested_is_tested_later(error, folder):
    def interrupted():
        raise error

    if isinstance(error, UntestedError):
        assert obstacle(KEY, interrupted) == "no memory"
    else:
        with pytest.raises(type(error)):
            obstacle(KEY, interrupted)
    assert not list(folder.glob("*.json"))
    assert obstacle(KEY, lambda: None) is None


@pytest.mark.parametrize("end", [lambda: os._exit(3), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_a_process_that_died_of_it_is_the_last_one(end, folder):
    assert in_a_process(obstacle, KEY, end) in (3, -signal.SIGKILL)
    (file,) = folder.glob("*.json")
    assert obstacle(KEY, not_again) == f"an earlier process died in its self-test; to try again, remove {file}"
    file.unlink()
    assert obstacle(KEY, lambda: None) is None


def test_processes_wait_for_the_one_that_tests(tmp_path):
    def slow():
        with open(tmp_path / "runs", "a") as file:
            file.write("run\n")
        time.sleep(0.3)

    def process():
        os._exit(obstacle(KEY, slow) is not None)

    processes = [multiprocessing.get_context("fork").Process(target=process) for _ in range(3)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(30)
    assert [each.exitcode for each in processes] == [0, 0, 0]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_no_process_waits_for_ever(monkeypatch, tmp_path):
    def process():
        obstacle(KEY, lambda: (tmp_path / "begun").touch() or time.sleep(30))

    other = multiprocessing.get_context("fork").Process(target=process)
    other.start()
    try:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        monkeypatch.setattr(verdicts, "SECONDS", 0.2)
        assert obstacle(KEY, not_again) == "another process has not finished its self-test in 0 s"
    finally:
        other.kill()
        other.join()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"outcome": "perhaps"}', "\udcff"], ids=repr)
def test_files_that_make_no_sense_are_replaced(content, folder):
    obstacle(KEY, lambda: None)
    (file,) = folder.glob("*.json")
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert "tested again" in obstacle(KEY, not_again)
    assert json.loads(file.read_text())["outcome"] == "failed"


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert obstacle(KEY, lambda: None) is None
    assert obstacle(KEY, lambda: "wrong") == "its self-test failed: wrong"


def test_a_folder_that_takes_no_files_is_no_error(folder, monkeypatch):
    def refuses(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(verdicts, "NamedTemporaryFile", refuses)
    monkeypatch.setattr(verdicts, "FileLock", refuses)
    assert obstacle(KEY, lambda: None) is None
    assert obstacle(KEY, lambda: "wrong") == "its self-test failed: wrong"
    assert not list(folder.iterdir())


def test_the_folder_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert obstacle({**KEY, "value": value}, lambda: None) is None
    assert [path.name for path in tmp_path.iterdir()] == [".cache"]
    assert len(list((tmp_path / ".cache/psa-diffusers/self-test").glob("*.json"))) == 2


def test_a_user_without_a_home_tests_each_time(monkeypatch):
    def none():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(verdicts.Path, "home", none)
    assert obstacle(KEY, lambda: None) is None
    assert obstacle(KEY, lambda: "wrong") == "its self-test failed: wrong"
