"""Merged tiles against one block at a time: table and plot. `interpreter/` has the kernel; times need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from operator_bench.tiles_plot import plot, table

ROOT = Path(__file__).resolve().parents[2]


def _row(method: str, pyramid: str, ms: float) -> dict:
    about = {"workload": "toy", "block_key": 64, "pyramid": pyramid, "density": 0.25}
    return {**about, "method": method, "ms": ms, "tflops": 100 / ms}


ROWS = [
    _row("naive", "psa-1", 6.0),
    _row("psa-triton", "psa-1", 5.0),
    _row("naive", "psa-2", 20.0),
    _row("psa-triton", "psa-2", 5.0),
    {"workload": "toy", "block_key": 64, "pyramid": "psa-2", "density": 0.25, "method": "psa-hopper", "error": "no"},
]


def test_speedups_are_over_the_naive_kernel() -> None:
    first, second = table(ROWS).splitlines()
    assert "psa-1" in first and "(1.20x)" in first
    assert "psa-2" in second and "(4.00x)" in second and "psa-hopper" not in second


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
