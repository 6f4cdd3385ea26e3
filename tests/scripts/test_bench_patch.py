"""The benchmark of the patch's host time: that its toys go through all phases, stock and patched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_a_short_run(monkeypatch, tmp_path, one_thread):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench_patch

    output = tmp_path / "patch.json"
    monkeypatch.setattr(bench_patch, "STEPS", 8)
    checkpoint, _ = bench_patch.MODELS["HunyuanVideo"]
    monkeypatch.setitem(bench_patch.MODELS, "HunyuanVideo", (checkpoint, {}))
    arguments = ["--family", "HunyuanVideo", "--preset", "psa-auto", "--runs", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    bench_patch.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["phase"] for row in rows] == list(bench_patch.PHASES)
    assert all(row["us_forward"] > 0 and row["us_stock_call"] > 0 for row in rows)
