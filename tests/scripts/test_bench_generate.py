"""The benchmark of psa-generate on a GPU: which figures of a run it takes, and which prompts and steps it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def ran(per_step, dense_at=None):
    return {"seconds": {"per_step": per_step}, "attention": None if dense_at is None else {"dense_at": dense_at}}


def test_steps_are_those_of_one_kind():
    from bench_generate import median_step

    assert median_step([ran([0.002, 0.003, 0.9])]) == 3.0
    assert median_step([ran([0.9, 0.9, 0.002, 0.004], [0, 1]), ran([0.8, 0.003], [0])]) == 3.0


def test_figures_are_what_the_command_reports(monkeypatch):
    import bench_generate

    def run(command, **settings):
        assert command[-2:] == ["a", "b"] and {"--compare", "--no-cuda-graphs"} <= set(command) and settings["check"]
        folder = Path(command[command.index("--output") + 1])
        for index, took in enumerate((9.0, 0.001)):  # the first prompt compiles
            (folder / str(index)).mkdir(parents=True)
            runs = {"dense": ran([took] * 3), "psa-5": ran([9.0, took, took], [0])}
            (folder / str(index) / "report.json").write_text(json.dumps({"runs": runs}))
        prompts = [{"density": 0.5, "psnr": psnr} for psnr in (30.0, 31.0)]
        summary = {"denoising": {"dense": 2.0, "sparse": 1.0}, "prompts": prompts}
        return SimpleNamespace(stdout=f"a line\n{json.dumps(summary)}\n")

    monkeypatch.setattr(bench_generate.subprocess, "run", run)
    assert bench_generate.measured("psa-5", ("--no-cuda-graphs",), ("a", "b")) == {
        "dense_s": 2.0,
        "sparse_s": 1.0,
        "dense_step_ms": 1.0,
        "sparse_step_ms": 1.0,
        "density": 0.5,
        "psnr": [30.0, 31.0],
    }


def test_one_prompt_is_too_few(monkeypatch, capsys):
    import bench_generate

    monkeypatch.setattr("sys.argv", ["bench_generate.py", "--prompts", "1"])
    with pytest.raises(SystemExit):
        bench_generate.main()
    assert "--prompts 1: 2 to 6" in capsys.readouterr().err
