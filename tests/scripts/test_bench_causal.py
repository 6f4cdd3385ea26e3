"""What the benchmark of causal calls shows, and what it measures."""

from __future__ import annotations

import bench_causal
import pytest


def test_tables(tmp_path, capsys):
    shared = {"tokens": 32_768, "method": "psa-count-triton", "density": 0.2503}
    total = {"ms": 5.5, "tflops": 350.2, "extra_over_output": 0.61, "error": 0.5}
    rows = [
        {**shared, "stage": "total", **total},
        {**shared, "stage": "importance", "ms": 0.1234},
        {"tokens": 65_536, "method": "fa3", "density": 1.0, "stage": "total", "failure": "OutOfMemoryError: no"},
    ]
    result = {"what": "causal calls", "hardware": "a GPU", "commit": "abc", "date": "2026-01-01", "rows": rows}
    bench_causal.show(result, tmp_path / "causal.json")
    text = (tmp_path / "causal.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| 32,768 | psa-count-triton | 0.250 | 5.50 | 350 | 0.61 | 0.5000 |" in text
    assert "| 32,768 | psa-count-triton | 0.250 | importance | 0.123 |" in text
    assert "| 65,536 | fa3 | 1.000 | OutOfMemoryError: no | | | |" in text


def test_both_rules_have_the_densities():
    *sparse, full = bench_causal.specs(64)
    assert full.levels == (1,) and full.thresholds == (1.0,)
    assert [spec.density for spec in sparse if spec.rule == "budget"] == list(bench_causal.DENSITIES)
    for spec, density in zip([spec for spec in sparse if spec.rule == "count"], bench_causal.DENSITIES, strict=True):
        bounds = (0.0, *spec.thresholds)
        cost = sum((bounds[i + 1] - bounds[i]) / level for i, level in enumerate(spec.levels))
        assert cost == pytest.approx(density, abs=0.005)
