"""Progress in a log: a line a prompt and a stage with the time left, and none where a terminal shows progress bars."""

import re
import sys

import pytest

from psa_diffusers.runs import progress
from psa_diffusers.runs.progress import FILES, Progress, StepLog, duration
from psa_testing.tiny_runs import STEPS, carry_out

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Time that a test lets pass."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


def through(progress, clock, prompts, seconds):
    for prompt in range(prompts):
        for name, each in seconds.items():
            with progress.stage(prompt, name):
                clock.seconds += each


@pytest.mark.parametrize(
    ("processes", "left"),
    [
        (1, ["8 min 20 s", "4 min 40 s", "5 min 0 s", "3 min 20 s", "2 min 40 s"]),
        (2, ["5 min 0 s", "2 min 20 s", "3 min 45 s", "2 min 5 s", "1 min 25 s"]),
    ],
)
def test_the_time_left_is_that_of_earlier_stages(processes, left, clock, capsys):
    """Of the second video nothing is known at first: it counts as long as the first, and no time for the files."""
    through(Progress(3, ["dense", "psa-3"], processes), clock, 3, {"dense": 100, "psa-3": 40, FILES: 10})
    stages = [f"prompt {number} of 3: {stage}" for number in (1, 2, 3) for stage in ("dense", "psa-3", FILES)]
    known = ["", *left, "2 min 30 s", "50 s", "10 s"]
    expected = [f"{stage}; about {time} left" if time else stage for stage, time in zip(stages, known, strict=True)]
    assert capsys.readouterr().err.splitlines() == expected


def test_steps_are_told_now_and_then(capsys):
    clock = Clock()
    log = StepLog("dense", clock)
    for step in range(10):
        clock.seconds += 90 if step == 0 else 9  # the first one compiles
        log.done(step, 10)
    assert capsys.readouterr().err.splitlines() == [
        "dense: step 1 of 10",
        "dense: step 4 of 10, about 54 s left",
        "dense: step 7 of 10, about 27 s left",
    ]


def test_another_loop_of_the_same_video_starts_anew(capsys):
    clock = Clock()
    log = StepLog("dense", clock)
    for step in (0, 1, 2, 0, 1, 2):
        clock.seconds += 15
        log.done(step, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["dense: step 2 of 4, about 30 s left", "dense: step 1 of 4", "dense: step 3 of 4, about 15 s left"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3900, "1 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_run_tells_each_stage(ask, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_APART", 0.0)
    carry_out(ask(compare=True))
    lines = [re.sub(r"about .* left", "about ? left", line) for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line.startswith(("prompt ", "dense: ", "small: "))]
    steps = {name: [f"{name}: step {number} of {STEPS}" for number in range(1, STEPS)] for name in ("dense", "small")}
    for name, (first, *later) in steps.items():
        steps[name] = [first, *(f"{line}, about ? left" for line in later)]
    expected = []
    for number in (1, 2):
        known = "" if number == 1 else "; about ? left"
        expected += [f"prompt {number} of 2: dense{known}", *steps["dense"]]
        expected += [f"prompt {number} of 2: small; about ? left", *steps["small"]]
        expected += [f"prompt {number} of 2: {FILES}; about ? left"]
    assert told == expected
    assert any(re.fullmatch(r".* is loaded, in \d+ s", line) for line in lines)


def test_a_terminal_has_bars_instead(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(1, ["dense"]).stage(0, "dense"):
        pass
    assert capsys.readouterr().err == ""
