"""The benchmarks of CUDA graphs and of short sequences: that they run, on toys, and what they make of figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_folder(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


def test_a_toy_of_the_graphs(monkeypatch, tmp_path, one_thread):
    import bench_graphs

    output = tmp_path / "graphs.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--tiny", "--model", "cogvideox-5b", "--repeats", "1", "--output", str(output)]
    )
    bench_graphs.main()
    rows = json.loads(output.read_text())["rows"]
    assert [row["phase"] for row in rows] == list(bench_graphs.PHASES)
    assert all(row["difference"] == 0 and row["ms"] > 0 for row in rows)
    assert output.with_suffix(".md").read_text().count("| cogvideox-5b | ") == len(rows)


def test_a_toy_of_short_sequences(monkeypatch, tmp_path, one_thread):
    import bench_min_tokens

    output = tmp_path / "min.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--repeats", "1", "--output", str(output)])
    bench_min_tokens.main()
    result = json.loads(output.read_text())
    assert {row["tokens"] for row in result["rows"]} == {128}
    assert len(result["crossings"]) == len(result["rows"]) == 12  # 3 dtypes, 2 densities, lists made and kept


@pytest.mark.parametrize(
    ("ratios", "crossing"),
    [([0.5, 1.1, 1.4], 2000), ([1.2, 0.9, 1.4], 3000), ([1.0, 1.1, 1.2], 1000), ([1.2, 1.1, 0.9], None)],
)
def test_the_crossing_is_where_sparse_stays_faster(ratios, crossing):
    import bench_min_tokens

    kind = dict.fromkeys(bench_min_tokens.KIND, 0)
    rows = [{**kind, "tokens": 1000 * (i + 1), "us": 1.0, "ratio": ratio} for i, ratio in enumerate(ratios)]
    assert bench_min_tokens.crossings(rows) == [{**kind, "crossing": crossing}]
