"""The benchmark of whole runs, as a toy: that each line is what it says, and how a run is summed up."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from psa_diffusers import Preset
from psa_diffusers.patch.full_attention import FullAttention

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"workload", "stack", "cache", "ms_dense", "ms_sparse", "seconds_50", "speedup", "peak_gib"}
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::psa_diffusers.patch.dense_reasons.PSAFallbackWarning"),
]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it on the toy of one workload, without a compiler; returns the rows, and what was to be compiled."""
    import bench_stack

    compiled = []
    monkeypatch.setattr(bench_stack, "compile_blocks", lambda *_: compiled.append("blocks"))
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append("forward") or call)

    def run(*arguments):
        output = tmp_path / "stack.json"
        chosen = ["--tiny", "--demo-prompts", "1", "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", ["bench_stack.py", "--workload", "wan2.1-14b-720p", *chosen])
        bench_stack.main()
        return json.loads(output.read_text())["rows"], compiled

    return run


def test_every_line_adds_one_thing(bench, monkeypatch):
    import bench_stack
    import stack_quality

    quantised = []
    for module in (bench_stack, stack_quality):
        monkeypatch.setattr(module, "quantise_linear", lambda module, scales: quantised.append(scales))
    monkeypatch.setattr(FullAttention, "implementation", "reference")
    rows, compiled = bench("--cache", "100")
    assert all(row.keys() >= FIELDS and "error" not in row for row in rows), rows
    names = [row["stack"] for row in rows]
    assert [len(name.split(" + ")) for name in names] == [1, 2, 3, 4, 5, 6]
    assert all(later.startswith(name + " + ") for name, later in pairwise(names))
    assert [row["cache"] for row in rows] == [None] * 5 + [100]
    assert rows[0]["speedup"] == 1 and rows[0]["ms_dense"] == rows[0]["ms_sparse"] and rows[0]["demo_psnr"] is None
    assert all(row["demo_psnr"] < 60 for row in rows[1:])
    assert quantised == ["row"] * 2  # the model, and the demo model
    # The cache alone skips forwards, and is no part of the graphs.
    assert [row["skipped_sparse"] for row in rows[:5]] == [0] * 5 and rows[5]["skipped_sparse"] > 0.5
    # Lines share the forwards that are the same: the dense ones of PSA are stock, and lists are made alike.
    blocks = 2
    assert compiled == ["blocks"] * (1 + 1 + 2 + 1 + 1) + ["forward"] * blocks * 4
    assert [row["ms_lists_made"] is None for row in rows] == [True] * 3 + [False] * 3
    assert [row["ms_skipped"] is None for row in rows] == [True] * 5 + [False]


def test_what_does_not_run_here_is_a_row_and_later_lines_do_without(bench, monkeypatch):
    import bench_stack

    none = {"psnr": None, "skipped_dense": 0.0, "skipped_sparse": 0.0}
    monkeypatch.setattr(bench_stack, "Demo", lambda *_: SimpleNamespace(figures=lambda line: none))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    rows, _ = bench()
    errors = {row["stack"].split(" + ")[-1]: row["error"] for row in rows if "error" in row}
    assert set(errors) == {"linear layers in float8", "dense steps by PSA"}
    assert "torchao" in errors["linear layers in float8"]
    assert errors["dense steps by PSA"] == "RuntimeError: PSA's kernel computed no dense step"
    assert rows[-1]["stack"] == "stock compiled + PSA at 0.15 + kept lists + first-block cache"


def test_a_run_is_the_sum_of_its_forwards():
    from bench_stack import seconds_of_a_run

    none = {"skipped_dense": 0.5, "skipped_sparse": 0.25}
    assert seconds_of_a_run(100, 40, 2, None, none) == pytest.approx(2 * (13 * 100 + 37 * 40) / 1000)
    cached = 2 * (13 * (50 + 5) + 37 * (30 + 2.5)) / 1000
    assert seconds_of_a_run(100, 40, 2, 10, none) == pytest.approx(cached)


def test_lists_serve_steps_and_branches():
    from stack_lines import REFRESH, Line

    assert Line().forwards_a_list(2) == 1 and Line(kept=True).forwards_a_list(2) == 2 * REFRESH


def test_the_preset_of_the_recipes_is_the_one_that_is_timed():
    from random_models import Machine
    from stack_lines import Line

    block = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    timed = Line(psa=True, kept=True, dense_psa=True).preset(Machine("cuda", torch.bfloat16, "inductor", False))
    assert Preset(**yaml.safe_load(block), name=timed.name, source=timed.source) == timed


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_only_the_linear_layers_of_blocks_are_quantised(scales, monkeypatch):
    import stack_lines

    found = {}
    model = torch.nn.ModuleDict(
        {
            "proj_out": torch.nn.Linear(16, 16, dtype=torch.bfloat16),
            "blocks": torch.nn.ModuleList(
                [
                    torch.nn.Linear(32, 16, dtype=torch.bfloat16),
                    torch.nn.Linear(32, 16),
                    torch.nn.Linear(30, 16, dtype=torch.bfloat16),
                    torch.nn.LayerNorm(16, dtype=torch.bfloat16),
                ]
            ),
        }
    )

    def quantize_(module, config, filter_fn):
        assert config["granularity"] == scales
        found.update({name: filter_fn(part, name) for name, part in module.named_modules()})

    names = {"Float8DynamicActivationFloat8WeightConfig": dict, "PerRow": lambda: "row", "PerTensor": lambda: "tensor"}
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.quantization", SimpleNamespace(quantize_=quantize_, **names))
    stack_lines.quantise_linear(model, scales)
    assert [name for name, chosen in found.items() if chosen] == ["blocks.0"]


@pytest.fixture
def quick(bench, monkeypatch):
    """The same without the demo model's videos and without quantised layers."""
    import bench_stack

    none = {"psnr": None, "skipped_dense": 0.0, "skipped_sparse": 0.0}
    monkeypatch.setattr(bench_stack, "Demo", lambda *_: SimpleNamespace(figures=lambda line: none))
    monkeypatch.setattr(bench_stack, "quantise_linear", lambda *_: None)
    monkeypatch.setattr(FullAttention, "implementation", "reference")
    return bench


def test_the_cache_is_a_line_of_minimax_h3(quick):
    rows, _ = quick("--workload", "h3-10s")
    assert rows[-1]["stack"].endswith("first-block cache") and not any("error" in row for row in rows), rows


def test_lines_that_an_earlier_run_measured_are_taken_from_it(quick, tmp_path):
    rows, compiled = quick()
    path = tmp_path / "stack.json"
    earlier = json.loads(path.read_text())
    killed = {key: rows[-1][key] for key in ("workload", "scales", "stack")}
    earlier["rows"] = [*rows[:-1], {**killed, "error": "killed"}]
    path.write_text(json.dumps(earlier))
    compiled.clear()
    merged, compiled = quick("--merge", str(path))
    assert [row["seconds_50"] for row in merged[:-1]] == [row["seconds_50"] for row in rows[:-1]]
    assert all(row["commit"] == earlier["commit"] for row in merged[:-1]) and "error" not in merged[-1]
    assert set(compiled) == {"forward"}


def test_other_scales_are_a_run_of_their_own(quick, tmp_path):
    rows, _ = quick()
    both, _ = quick("--scales", "tensor", "--merge", str(tmp_path / "stack.json"))
    first, second = both[: len(rows)], both[len(rows) :]
    assert [row["seconds_50"] for row in first] == [row["seconds_50"] for row in rows]
    assert {row["scales"] for row in first} == {"row"} and {row["scales"] for row in second} == {"tensor"}
    assert len(second) == len(rows) and second[0]["speedup"] == 1
    assert [row["stack"] for row in second[:2]] == [row["stack"] for row in first[:2]]
