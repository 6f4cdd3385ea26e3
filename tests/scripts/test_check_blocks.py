"""The check of one block of each published transformer, at toy size: its rows, and that each of its checks can fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import block_checks
import check_blocks
import pytest
import torch
from random_models import Machine, build, make_inputs, pick_machine

from psa_diffusers.families import find_family
from psa_testing.families import NETWORKS, PUBLISHED, TESTS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [published.name for published in PUBLISHED if published.toy]
PADDED = {model for tests in TESTS if tests.masks_padding for model in tests.networks}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments):
        output = tmp_path / "blocks.json"
        monkeypatch.setattr(sys, "argv", ["check_blocks.py", "--tiny", "--output", str(output), *arguments])
        status = check_blocks.main()
        return status, json.loads(output.read_text())["rows"]

    return run


def test_a_toy_of_every_class(run, capsys):
    status, rows = run("--only", *NAMES)
    printed = capsys.readouterr().out
    assert [row["name"] for row in rows] == list(NAMES) and status == 0, [row.get("error") for row in rows]
    assert json.loads(printed.splitlines()[-1])["rows"] == rows
    for row in rows:
        assert row["failed"] == [] and row["identical"] and row["finite"] and row["tokens"] == 192
        assert len(row["attentions"]) == NETWORKS[row["model"]].kinds
        assert row["kept_error"] < 1e-5 and row["kept_output_error"] < 1e-5 and row["psa_error"] > 0.05
        assert 0.2 < row["density"] < 0.35 and row["implementation"] == "reference"
        assert (row["padding_change"] == 0) == (row["text_change"] is not None) == (row["model"] in PADDED)
        assert f"| {row['name']} | 2 x {row['head_dim']} | 192 | identical |" in printed


def test_an_error_is_a_row_and_rows_can_be_completed(run, tmp_path, monkeypatch, capsys):
    check = check_blocks.check

    def fail(checkpoint, machine, repeats):
        if checkpoint.endswith("LTX-Video"):
            raise RuntimeError("out of memory\nat all")
        return check(checkpoint, machine, repeats)

    monkeypatch.setattr(check_blocks, "check", fail)
    status, rows = run("--only", "LTX-Video", "CogVideoX-2b")
    assert status == 1 and rows[0]["error"] == "RuntimeError: out of memory" and rows[1]["failed"] == []
    assert "| LTX-Video |" in capsys.readouterr().out
    monkeypatch.setattr(check_blocks, "check", check)
    status, completed = run("--only", "LTX-Video", "--merge", str(tmp_path / "blocks.json"))
    assert status == 0 and [row["name"] for row in completed] == ["CogVideoX-2b", "LTX-Video"]
    assert completed[0] == {**rows[1], "commit": completed[0]["commit"]}


def failed(checkpoint: str) -> list[str]:
    return block_checks.check(checkpoint, pick_machine(True, "test"), 1)["failed"]


def test_attended_padding_is_noticed(monkeypatch):
    from psa_diffusers.families.mochi import Mochi

    monkeypatch.setattr(Mochi, "text_mask", staticmethod(lambda call: None))
    assert failed("genmo/mochi-1-preview") == [
        "attention that keeps everything equals dense to rounding",
        "the output that keeps everything equals dense to rounding",
        "padded text changes nothing",
    ]


def test_a_skipped_block_and_a_sparse_dense_phase_are_noticed(monkeypatch):
    scaled_preset = block_checks.scaled_preset

    def broken(machine, density):
        return scaled_preset(machine, 0.25).replace(dense_steps=0.0)

    monkeypatch.setattr(block_checks, "scaled_preset", broken)
    assert failed("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == [
        "the dense phase is bit-identical to stock",
        "everything is kept at thresholds of 1",
        "attention that keeps everything equals dense to rounding",
        "the output that keeps everything equals dense to rounding",
        "psa-3 differs from dense",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("checkpoint", ["Lightricks/LTX-Video", "zai-org/CogVideoX-5b", "genmo/mochi-1-preview"])
def test_short_models_at_full_size(checkpoint):
    row = block_checks.check(checkpoint, pick_machine(False, "test"), 1)
    assert row["failed"] == [] and row["psa_ms"] > 0 and row["dense_peak_gib"] > 0


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_inputs_at_full_size_are_what_the_transformer_takes(published):
    """On the meta device, which has shapes alone."""
    machine = Machine("meta", torch.bfloat16, "eager", False)
    network = NETWORKS[published.model]
    with torch.device("meta"), torch.no_grad():
        transformer = build(published.checkpoint, machine, **network.one_block)
        inputs = make_inputs(published.checkpoint, transformer, machine, padding=block_checks.PADDING)
        assert find_family(transformer).token_grid(transformer, inputs) == published.grid
        if not network.reads_masks:
            output, latents = transformer(**inputs).sample, published.latents
            if network.frames_first:
                assert output.shape[1] == latents[1] and output.shape[3:] == latents[3:]
            elif network.channels_last:
                assert output.shape[1:4] == latents[1:4]
            else:
                assert output.shape[2:] == latents[2:]
    joint = find_family(transformer).text == "before"
    assert not joint or inputs["encoder_hidden_states"].shape[1] == published.text
