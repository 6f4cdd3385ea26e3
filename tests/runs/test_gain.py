"""Where a compared sparse run was not faster than the dense one, it says so; what compiling took does not count."""

from __future__ import annotations

import json

import pytest

from psa_diffusers.cli import generate as command
from psa_diffusers.runs.gain import settled_seconds
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.step_clock import StepClock


@pytest.mark.parametrize(
    ("sparse", "dense_at", "expected"),
    [
        ([2, 1, 1, 1, 1, 1], [0], {"dense": 12, "sparse": 7}),
        ([9, 30, 1, 1, 1, 1], [0], {"dense": 12, "sparse": 7}),  # kernels were compiled in two steps
        ([9, 30, 1, 1, 1, 3, 1, 1, 1, 3], [0], {"dense": 12, "sparse": 15}),  # lists were made in three
        ([2, 2, 3, 9, 1, 1], [0, 1, 2], {"dense": 12, "sparse": 10}),
        ([1.5, 1.5, 1.5, 1, 1, 1], [0, 1, 2], {"dense": 12, "sparse": 7.5}),  # another dense attention
        ([2, 2, 2, 2, 3, 30], [0, 1, 2, 3], None),  # which of the two compiled?
        ([2, 2, 2, 2, 2, 2], [0, 1, 2, 3, 4, 5], None),
    ],
)
def test_all_steps_count_without_what_the_first_of_a_kind_compiled(sparse, dense_at, expected):
    assert settled_seconds([8, 2, 2, 2, 2, 2], sparse, dense_at) == expected


@pytest.fixture
def timed(ask, monkeypatch, capsys, tmp_path, one_thread):
    """Makes a comparison of two prompts whose runs take given times; gives stderr, the JSON and the page."""

    def run(dense: float, sparse: float, **changes):
        made = []
        seconds = StepClock.seconds

        def told(clock):
            made.append(clock)
            step, compiling = (dense, 1) if len(made) % 2 else (sparse, 60)
            return {**seconds(clock), "per_step": [40 * step, step, compiling * step, step, step, step]}

        monkeypatch.setattr(StepClock, "seconds", told)
        command._carry_out(make_plan(ask(steps=6, compare=True, **changes)), 1)
        out = capsys.readouterr()
        return out.err, json.loads(out.out.splitlines()[-1]), (tmp_path / "out" / "report.html").read_text()

    return run


def test_a_slower_run_says_so_once(timed, tmp_path):
    err, summary, page = timed(2.0, 2.5)
    line = summary["denoising"]["not_faster"]
    # two dense steps, which count as those of the dense run
    assert (summary["denoising"]["dense"], summary["denoising"]["sparse"]) == (12, 14)
    assert line.startswith(
        "denoising with small took 1.17 times as long as dense, 14 s against 12 s, compiling left out"
    )
    assert line.endswith("attention of 32 tokens x 2 heads gains nothing on this device")
    assert err.count(line) == page.count(line) == 1
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    assert report["comparison"]["denoising"] == {"dense": 12, "sparse": 14}


def test_a_faster_run_says_nothing(timed):
    err, summary, page = timed(2.0, 1.5)
    assert summary["denoising"] == {"dense": 12, "sparse": 10, "not_faster": None}
    assert "times as long" not in err + page
