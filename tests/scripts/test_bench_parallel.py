"""The benchmark of several devices, at toy size with gloo: that it runs through torchrun, and what it writes."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"workload", "method", "density", "gpus", "ms", "speedup", "peak_gib", "communication", "imbalance"}
ALL = ("wan2.1-14b-720p", "hunyuanvideo-720p", "cogvideox-5b")
BOTH = ("sdpa-cudnn", "psa")


def by_torchrun(script, output, forks):
    """As a user runs it; gives what it printed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def by_forks(script, output, forks):
    """As torchrun runs it, in processes that have imported everything; gives what the first rank printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [forks.Process(target=one_rank, args=(rank, port, script, output)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return output.with_suffix(".0").read_text()


def one_rank(rank, port, script, output):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).parent))
    with output.with_suffix(f".{rank}").open("w") as said, redirect_stdout(said):
        runpy.run_path(script[0], run_name="__main__")


@pytest.mark.parametrize(
    ("workloads", "methods", "compiled", "launch"),
    [(ALL, BOTH, False, by_torchrun), (("cogvideox-5b",), ("psa",), True, by_forks)],
)
def test_a_toy_runs_on_two_ranks(tmp_path, forks, workloads, methods, compiled, launch):
    output = tmp_path / "rows.json"
    script = [str(ROOT / "scripts/bench_parallel.py"), "--tiny", "--output", str(output)]
    script += ["--workload", *workloads, "--method", *methods, *([] if compiled else ["--eager"])]
    printed = launch(script, output, forks)
    rows = json.loads(output.read_text())["rows"]
    assert json.loads(printed.splitlines()[-1])["rows"] == rows
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
