"""The benchmark of growing lengths, at toy size on the CPU: its rows, its plot, and that its check can fail."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bench_scaling
import pytest
import torch

from psa_kernels import AttentionSpec, psa_attention, select_blocks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
def test_a_toy_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    output = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", "--tiny", "--repeats", "1", "--output", str(output)])
    assert bench_scaling.main() == 0
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = result["rows"]
    methods = [(512, 2, "sdpa"), *[(512, 2, "psa")] * 3, (1000, 2, "sdpa"), *[(1000, 2, "psa")] * 3, (1000, 3, "psa")]
    assert [(row["tokens"], row["heads"], row["method"]) for row in rows] == methods
    assert all(row["ms"] > 0 and row["extra_gib"] is None for row in rows)
    sparse = [row for row in rows if row["method"] == "psa"]
    assert all(row["finite"] and row["implementation"] == "reference" and row["density"] < 0.35 for row in sparse)
    # The sparsest of each length, and the one with more heads.
    assert [row["tokens"] for row in sparse if "relative_error" in row] == [512, 1000, 1000]
    if output.with_suffix(".png").exists():
        assert output.with_suffix(".png").stat().st_size > 1000
    else:
        pytest.importorskip("matplotlib")
        pytest.fail("no plot")


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --tiny"):
        bench_scaling.main()


@pytest.mark.parametrize("wrong", [None, 0, 600, 999])
def test_the_check_finds_wrong_rows(wrong):
    q, k, v = torch.randn(3, 1, 1000, 2, 16)
    spec = AttentionSpec(thresholds=(0.03, 0.05, 0.09))
    lists = select_blocks(q, k, spec)
    out = psa_attention(q, k, v, spec, lists=lists)
    if wrong is not None:
        out[:, wrong, 1] = 100.0
    error = bench_scaling.worst_error(q, k, v, out, lists, spec)
    assert (error < bench_scaling.TOLERANCE[torch.float32]) == (wrong is None)
    row = {"method": "psa", "ms": 1.0, "finite": True, "relative_error": error}
    assert bench_scaling._is_right(row, bench_scaling.TOLERANCE[torch.float32]) == (wrong is None)


def test_values_that_are_not_finite_are_an_error_of_infinity():
    q, k, v = torch.randn(3, 1, 500, 1, 16)
    lists = select_blocks(q, k, AttentionSpec())
    out = psa_attention(q, k, v, AttentionSpec(), lists=lists)
    out[0, 0] = float("nan")
    assert bench_scaling.worst_error(q, k, v, out, lists, AttentionSpec()) == float("inf")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_480_000_tokens_on_a_gpu():
    options = argparse.Namespace(tiny=False, repeats=1)
    inputs = bench_scaling._inputs(480_000, 2, 128, options)
    [row] = bench_scaling._sparse(*inputs, 0.05, options)
    assert bench_scaling._is_right(row, bench_scaling.TOLERANCE[torch.bfloat16]), row
    assert abs(row["density"] - 0.05) < 0.001
