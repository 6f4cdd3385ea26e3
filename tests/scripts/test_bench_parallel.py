"""The benchmark of several devices, at toy size with gloo: that it runs through torchrun, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"workload", "method", "density", "gpus", "ms", "peak_gib", "communication", "imbalance"}


ALL = ("wan2.1-14b-720p", "hunyuanvideo-720p", "cogvideox-5b")


BOTH = ("sdpa-cudnn", "psa")


@pytest.mark.parametrize(
    ("workloads", "methods", "compiled"), [(ALL, BOTH, False), (("cogvideox-5b",), ("psa",), True)]
)
def test_a_toy_runs_on_two_ranks(tmp_path, workloads, methods, compiled):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "scripts/bench_parallel.py"), "--tiny", "--output", str(tmp_path / "rows.json")]
    script += ["--workload", *workloads, "--method", *methods, *([] if compiled else ["--eager"])]
    done = subprocess.run([*torchrun, *script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == rows
    assert [(row["workload"], row["method"], row["compiled"], row["gpus"]) for row in rows] == [
        (workload, method, with_graphs, gpus)
        for workload in workloads
        for gpus in (1, 2)
        for with_graphs in ((False, True) if compiled else (False,))
        for method in methods
    ]
    for row in rows:
        assert row.keys() >= FIELDS and row["ms"] > 0
        assert row["density"] == 1 if row["method"] == "sdpa-cudnn" else 0.1 < row["density"] < 0.3
        assert (row["communication"] > 0) == (row["gpus"] == 2)
        assert row["gpus"] == 1 or row["error"] < 1e-4
