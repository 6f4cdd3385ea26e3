"""The benchmark of whole models, at toy size: that it runs, and what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"workload", "method", "density", "compiled", "ms", "peak_gib"}


@pytest.fixture
def bench(monkeypatch):
    import bench_model

    def run(output, *arguments):
        monkeypatch.setattr(sys, "argv", ["bench_model.py", "--tiny", "--output", str(output), *arguments])
        bench_model.main()
        return json.loads(output.read_text())["rows"]

    yield run
    torch._dynamo.reset()


@pytest.mark.usefixtures("one_thread")
def test_a_toy_of_every_kind_runs(bench, tmp_path, capsys):
    models = ("wan2.1-14b-720p", "hunyuanvideo-720p", "cogvideox-5b")
    rows = bench(tmp_path / "eager.json", "--eager", "--workload", *models, "--method", "sdpa-default", "psa")
    printed = capsys.readouterr().out
    assert len(rows) == 3 * (1 + 3) and all(row.keys() >= FIELDS and row["ms"] > 0 for row in rows)
    assert [row["workload"] for row in rows[::4]] == list(models)
    densities = [row["density"] for row in rows[:4]]
    assert densities[0] == 1 and densities[1:] == sorted(densities[1:], reverse=True) and densities[1] < 0.5
    errors = [float(line.split()[-1]) for line in printed.splitlines() if "keeps everything" in line]
    assert len(errors) == 3 and max(errors) < 1e-4
    dense, sparse = rows[:2]
    expected = 2 * (13 * dense["ms"] + 37 * sparse["ms"]) / 1000
    assert sparse["run_50_steps_s"] == pytest.approx(expected, abs=0.06)


@pytest.mark.usefixtures("one_thread")
def test_compiled_rows_are_added_to_an_earlier_file(bench, tmp_path):
    chosen = ("--workload", "wan2.1-14b-720p", "--density", "0.15", "--method")
    eager = bench(tmp_path / "eager.json", "--eager", *chosen, "psa")
    compiled = ("--compiled", *chosen, "psa", "sdpa-default", "--merge", str(tmp_path / "eager.json"))
    rows = bench(tmp_path / "both.json", *compiled)
    assert rows[0] == {**eager[0], "commit": rows[0]["commit"]} and "run_50_steps_s" not in rows[0]
    assert [(row["method"], row["compiled"]) for row in rows[1:]] == [("psa", True), ("sdpa-default", True)]
    assert all("ms" in row and "run_50_steps_s" in row for row in rows[1:])


def test_a_method_that_fails_is_a_row_and_leaves_the_others_alone(bench, tmp_path, monkeypatch):
    import bench_model
    import dense_attention

    compile_blocks, failures = bench_model.compile_blocks, []

    def fail_at_first(transformer, backend):
        compile_blocks(transformer, backend)
        if not failures:
            failures.append(transformer)
            raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(bench_model, "compile_blocks", fail_at_first)
    monkeypatch.setattr(dense_attention, "FA3_MODULE", "no_such_module")
    attention = torch.nn.functional.scaled_dot_product_attention
    chosen = ("--workload", "wan2.1-1.3b-720p", "--density", "0.25", "--method", "fa3", "psa", "sdpa-default")
    rows = bench(tmp_path / "rows.json", *chosen)
    errors = [row.get("error") for row in rows]
    missing = "ModuleNotFoundError: No module named 'no_such_module'"
    assert errors == [missing, None, None, missing, "RuntimeError: no compiler", None]
    assert [row["compiled"] for row in rows] == [False] * 3 + [True] * 3
    assert torch.nn.functional.scaled_dot_product_attention is attention
    (transformer,) = failures
    assert all(module._compiled_call_impl is None for module in transformer.modules())
    assert {type(processor).__name__ for processor in transformer.attn_processors.values()} == {"WanAttnProcessor"}
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks


def test_a_failing_comparison_stops_nothing(bench, tmp_path, monkeypatch, capsys):
    import bench_model

    def fail(*arguments):
        raise ValueError("out of memory")

    monkeypatch.setattr(bench_model, "block_error", fail)
    rows = bench(tmp_path / "rows.json", "--eager", "--workload", "wan2.1-14b-720p", "--method", "sdpa-default", "psa")
    assert len(rows) == 4 and all("ms" in row for row in rows)
    assert "could not be compared: ValueError: out of memory" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_3_takes_the_joint_attention_only(bench, monkeypatch, compiled):
    import bench_model
    import dense_attention
    from random_models import WORKLOADS, build, make_inputs, pick_machine

    calls, wrong = [], []

    def flash_attn_func(q, k, v):
        calls.append(q.shape)
        if wrong:
            return v.clone()
        weights = torch.einsum("bqhd, bkhd -> bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhqk, bkhd -> bqhd", weights, v), weights

    monkeypatch.setitem(sys.modules, "fake_fa3", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(dense_attention, "FA3_MODULE", "fake_fa3")
    monkeypatch.setattr(dense_attention, "MIN_TOKENS", 100)
    workload, machine = WORKLOADS["hunyuanvideo-720p"], pick_machine(True, "test")
    torch.manual_seed(0)
    transformer = build(workload.checkpoint, machine)
    inputs = make_inputs(workload.checkpoint, transformer, machine)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(8 if weight.dim() > 1 else 1)  # else attention hardly shows in the output
        stock = transformer(**inputs).sample
        with dense_attention.flash_attention_3():
            if compiled:
                bench_model.compile_blocks(transformer, "eager")
            flash = transformer(**inputs).sample
    # One dual-stream and one single-stream block; 192 video and 16 text tokens.
    assert calls == [(1, 208, 2, 16)] * 2
    assert float((flash - stock).norm() / stock.norm()) < 1e-5
    wrong.append(True)
    with torch.no_grad(), dense_attention.flash_attention_3():
        assert float((transformer(**inputs).sample - stock).norm() / stock.norm()) > 1e-2
    inputs["encoder_attention_mask"][:, -1] = 0
    with pytest.raises(ValueError, match="some of the text is padding"):
        bench_model.run(transformer, inputs, "fa3", 1.0, False, 1, machine)


def test_merging_keeps_what_was_not_measured_again(bench):
    import bench_model

    def row(workload, method, density=1.0, compiled=True, **figures):
        return {"workload": workload, "method": method, "density": density, "compiled": compiled, **figures}

    earlier = [
        row("a", "psa", 0.1518, ms=1),
        row("a", "psa", 0.2504, ms=2),
        row("a", "fa3", ms=3),
        row("a", "fa3", compiled=False, error="none"),
        row("b", "fa3", ms=4),
    ]
    again = row("a", "psa", 0.1563, asked=0.15, ms=5)
    new = row("a", "fa3", compiled=False, ms=6)
    rows = bench_model.merge(earlier, [again, row("a", "fa3", error="out of memory"), new])
    assert rows == [earlier[1], earlier[2], earlier[4], again, new]


def test_an_unreadable_earlier_file_is_refused_before_anything_runs(bench, tmp_path):
    for text in (None, "{}", "no JSON"):
        path = tmp_path / "earlier.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SystemExit, match=r"--merge .*earlier\.json: not a file of results"):
            bench(tmp_path / "rows.json", "--merge", str(path))
    path.write_text(json.dumps({"rows": [], "commit": "", "hardware": {"gpu": "NVIDIA H200"}}))
    with pytest.raises(SystemExit, match="measured on NVIDIA H200, not on a CPU"):
        bench(tmp_path / "rows.json", "--merge", str(path))
    with pytest.raises(SystemExit, match=r"--output .*earlier\.json: exists; --merge .*earlier\.json keeps its rows"):
        bench(path)
    assert not (tmp_path / "rows.json").exists() and json.loads(path.read_text())["rows"] == []
