"""The benchmark of prefills, as a toy: that it runs, and what it writes."""

from __future__ import annotations

import json
import sys

import pytest
import torch


@pytest.mark.usefixtures("one_thread")
def test_a_toy_has_a_row_for_each_density(tmp_path, monkeypatch):
    import bench_prefill

    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench_prefill.py", "--tiny", "--output", str(output)])
    bench_prefill.main()
    written = json.loads(output.read_text())
    rows = written["rows"]
    assert [(row["method"], row["density"]) for row in rows] == [
        ("sdpa", 1.0),
        *(("psa-reference", density) for density in (0.35, 0.25, 0.15)),
    ]
    assert written["layers"] == 1 and all(row["ms"] > 0 and row["tokens"] == 1536 for row in rows)
    found = [row["density_found"] for row in rows[1:]]
    assert found == sorted(found, reverse=True) and found[0] < 1 and not any(row["fallbacks"] for row in rows[1:])


def test_without_a_gpu_it_says_so(monkeypatch):
    import bench_prefill

    monkeypatch.setattr(sys, "argv", ["bench_prefill.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device; --tiny runs a toy"):
        bench_prefill.main()
