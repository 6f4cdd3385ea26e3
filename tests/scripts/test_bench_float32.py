"""The benchmark of float32, as a toy: that it runs, and what it writes."""

from __future__ import annotations

import json
import sys

import pytest
import torch


def test_a_toy_has_a_row_for_each_setting(tmp_path, monkeypatch):
    import bench_float32

    output, before = tmp_path / "rows.json", torch.get_float32_matmul_precision()
    monkeypatch.setattr(sys, "argv", ["bench_float32.py", "--tiny", "--output", str(output)])
    bench_float32.main()
    rows = json.loads(output.read_text())["rows"]
    assert [(row["method"], row["density"]) for row in rows[:4]] == [
        ("sdpa", 1.0),
        *(("psa-reference", density) for density in (1.0, 0.25, 0.15)),
    ]
    assert [row["tf32"] for row in rows] == [False] * 4 + [True] * 4
    assert all(row["ms"] > 0 and row["tokens"] == 192 for row in rows)
    # Everything kept is dense to rounding; what is left out is not.
    assert rows[0]["error"] < 1e-5 and rows[1]["error"] < 1e-5 and rows[2]["error"] > 1e-3
    assert all(row["ratio"] == pytest.approx(rows[0]["ms"] / row["ms"], abs=2e-3) for row in rows[:4])
    assert torch.get_float32_matmul_precision() == before


def test_without_a_gpu_it_says_so(monkeypatch):
    import bench_float32

    monkeypatch.setattr(sys, "argv", ["bench_float32.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; --tiny runs a toy"):
        bench_float32.main()
