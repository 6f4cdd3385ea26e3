"""The benchmark of many prompts: what it calls settled, and what it counts as the same."""

from __future__ import annotations

import json
import sys

import pytest


def test_the_rate_is_that_of_prompts_after_the_first_ones():
    from bench_prompts import BEFORE, settled_rate

    # Two processes, whose first prompt takes 9 seconds, and each other one 2.
    finished = [9.0, 9.5, 11.0, 11.5, 13.0, 13.5, 15.0, 15.5]
    assert BEFORE == 2 and settled_rate(finished, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("lost", [False, True])
def test_what_a_number_of_processes_makes_is_compared(lost, monkeypatch, tmp_path):
    import bench_prompts

    def generate(prompts, output, processes, options):
        for index in range(len(prompts.read_text().splitlines()) - (lost and processes == 2)):
            folder = output / f"{index:04}"
            folder.mkdir(parents=True)
            (folder / "prompt.json").write_text(json.dumps({"videos": {"psa-3": "psa-3.mp4"}}))
            (folder / "psa-3.mp4").write_bytes(bytes([index, processes if index == 3 else 0]))
        return 1.0

    monkeypatch.setattr(bench_prompts, "generate", generate)
    monkeypatch.setattr(bench_prompts, "settled_rate", lambda finished, processes: 1.8 * processes)
    monkeypatch.setattr(bench_prompts, "PROMPT_FILE", "prompt.json")
    output = tmp_path / "prompts.json"
    monkeypatch.setattr(sys, "argv", ["bench_prompts.py", "--prompts", "6", "--device", "cpu", "--output", str(output)])
    if lost:
        with pytest.raises(SystemExit, match="2 processes made 5 of 6 prompts"):
            bench_prompts.main()
        return
    bench_prompts.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["same_files"] for row in rows] == [6, 5] and [row["share"] for row in rows] == [1, 1]
