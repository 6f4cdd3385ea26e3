"""Rows, tables and plot of the operator's benchmark; its times need a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from operator_bench import peers, plot, tables, timing
from operator_bench.workloads import WORKLOADS, Case, Workload

ROOT = Path(__file__).resolve().parents[2]

TOY = Workload("toy", heads=2, head_dim=64, grid=(10, 10, 10), text=24)


def _row(method: str, density: float, stage: str, ms: float, tflops: float | None = None) -> dict:
    figures = {"ms": ms, "tflops": tflops, "extra_gib": 0.5}
    return {"workload": "toy", "method": method, "density": density, "stage": stage, **figures}


ROWS = [
    _row("sdpa-fa2", 1.0, "total", 40.0),
    _row("fa3", 1.0, "total", 20.0),
    _row("psa-triton", 0.1512, "attention", 4.0, 400.0),
    _row("psa-triton", 0.1512, "total", 5.0, 350.0),
    _row("sol-attn", 0.165, "total", 8.0),
    {"workload": "toy", "method": "flex", "density": None, "stage": "total", "error": "ValueError: no"},
]


def test_a_shared_stage_has_a_row_for_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda call, repeats: (2.0, 0.25))
    both = ("psa-triton", "psa-hopper")
    rows = list(timing.rows_of(Case(both, 0.15, "pyramid", lambda: None), TOY, 7))
    assert [row["method"] for row in rows] == list(both)
    assert {row["tflops"] for row in rows} == {None}
    [total] = timing.rows_of(Case(("fa3",), 0.5, "total", lambda: None), TOY, 7)
    # Half of 4 x 1024^2 x 64 x 2 operations in 2 ms.
    assert total["tflops"] == round(4 * 1024**2 * 64 * 2 / 2 / 2e-3 / 1e12, 1)


def test_a_call_that_fails_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(call, repeats):
        raise ValueError("not here\nand more")

    monkeypatch.setattr(timing, "measure", measure)
    [row] = timing.rows_of(Case(("flex",), None, "total", lambda: None), TOY, 7)
    assert row["error"] == "ValueError: not here" and row["density"] is None and "ms" not in row
    json.dumps(row)


def test_stages_of_both_precisions_stand_side_by_side() -> None:
    rows = [_row(method, 0.15, "attention", 2.0, 300.0) for method in ("psa-hopper", "psa-hopper-int8")]
    lines = tables.stage_table([*rows, _row("psa-hopper-int8", 0.15, "quantise", 0.25)]).splitlines()
    head, _, native, int8 = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    place = head.index("quantise")
    assert (native[2], native[place], int8[2], int8[place]) == ("psa-hopper", "", "psa-hopper-int8", "0.250")
    assert set(plot.COLOURS) == set(tables.METHODS)


def test_speedups_compare_with_the_fastest_dense_peer() -> None:
    table = tables.workload_table(ROWS, "toy").splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table}
    assert cells["method"] == ["dense", "density 0.10", "density 0.15", "density 0.25", "extra GiB"]
    assert cells["fa3"][0] == "20.0 (1.00x)" and cells["sdpa-fa2"][0] == "40.0 (0.50x)"
    assert cells["psa-triton"][2] == "5.000 (4.00x)"
    assert cells["sol-attn"][2] == "8.000 (2.50x) at 0.165"
    assert "flex" not in cells


def test_the_page_holds_stages_and_failures() -> None:
    page = tables.report(
        {
            "rows": ROWS,
            "hardware": {"processor": "p", "gpu": "g"},
            "versions": {"torch": "2"},
            "commit": "c",
            "date": "d",
            "importance": "i",
            "block_key": 64,
        }
    )
    assert "- toy, flex, total: ValueError: no" in page
    [stages] = [line for line in page.splitlines() if "| 0.1512 " in line]
    assert "4.000" in stages and "5.000" in stages and "400" in stages


def test_plot(tmp_path: Path) -> None:
    plot.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_densities_of_the_authors_lists_are_close_to_those_asked_for() -> None:
    for workload in WORKLOADS:
        for asked, thresholds in peers.THRESHOLDS.items():
            found = peers.authors_density(thresholds, -(-workload.tokens // peers.TILE))
            assert tables.nearest(found) == asked and abs(found - asked) < 0.006
