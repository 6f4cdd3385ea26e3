"""The benchmark of whole models, at toy size: that it runs, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"workload", "method", "density", "compiled", "ms", "peak_gib"}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_model

    def run(output, *arguments):
        monkeypatch.setattr(sys, "argv", ["bench_model.py", "--tiny", "--output", str(output), *arguments])
        bench_model.main()
        return json.loads(output.read_text())["rows"]

    yield run
    torch._dynamo.reset()


@pytest.mark.usefixtures("one_thread")
def test_a_toy_of_every_kind_runs(bench, tmp_path, capsys):
    models = ("wan2.1-14b-720p", "hunyuanvideo-720p", "cogvideox-5b")
    rows = bench(tmp_path / "eager.json", "--eager", "--workload", *models, "--method", "sdpa-default", "psa")
    printed = capsys.readouterr().out
    assert len(rows) == 3 * (1 + 3) and all(row.keys() >= FIELDS and row["ms"] > 0 for row in rows)
    assert [row["workload"] for row in rows[::4]] == list(models)
    densities = [row["density"] for row in rows[:4]]
    assert densities[0] == 1 and densities[1:] == sorted(densities[1:], reverse=True) and densities[1] < 0.5
    errors = [float(line.split()[-1]) for line in printed.splitlines() if "keeps everything" in line]
    assert len(errors) == 3 and max(errors) < 1e-4
    dense, sparse = rows[:2]
    expected = 2 * (13 * dense["ms"] + 37 * sparse["ms"]) / 1000
    assert sparse["run_50_steps_s"] == pytest.approx(expected, abs=0.06)


@pytest.mark.usefixtures("one_thread")
def test_compiled_rows_are_added_to_an_earlier_file(bench, tmp_path):
    chosen = ("--workload", "wan2.1-14b-720p", "--density", "0.15", "--method")
    eager = bench(tmp_path / "eager.json", "--eager", *chosen, "psa")
    compiled = ("--compiled", *chosen, "psa", "sdpa-default", "--merge", str(tmp_path / "eager.json"))
    rows = bench(tmp_path / "both.json", *compiled)
    assert rows[0] == eager[0] and "run_50_steps_s" not in rows[0]
    assert [(row["method"], row["compiled"]) for row in rows[1:]] == [("psa", True), ("sdpa-default", True)]
    assert all("ms" in row and "run_50_steps_s" in row for row in rows[1:])
