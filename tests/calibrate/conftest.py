"""psa-calibrate on saved tiny pipelines, which tests call as the command is called."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from psa_diffusers import load_preset
from psa_diffusers.calibrate import runner, shapes
from psa_diffusers.calibrate.shapes import BASE
from psa_diffusers.cli import calibrate as cli_calibrate
from psa_diffusers.cli.shell import run_command
from psa_testing.tiny_pipelines import tiny_wan

SMALL = ["--height", "96", "--width", "96", "--frames", "9", "--steps", "4", "--guidance", "1"]
PROMPTS = ["a cat", "a dog", "a cow", "a hen", "an owl", "a fox"]
BASE_YAML = (
    "block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.2, 0.35, 0.5]\n"
    "layers: [{match: 0, dense: true}]\ndense_steps: 0.5\n"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Saved tiny pipelines and presets to start from."""
    folder = tmp_path_factory.mktemp("models")
    tiny_wan(num_layers=4).save_pretrained(folder / "wan")
    experts = tiny_wan(two_stage=True, num_layers=2)
    with torch.no_grad():
        experts.transformer_2.blocks[0].attn1.to_out[0].weight.mul_(20)
    experts.save_pretrained(folder / "experts")
    (folder / "base.yaml").write_text(BASE_YAML)
    auto = load_preset("psa-auto").model_dump(mode="json", exclude_unset=True)
    auto |= {"block": {"query": 32, "key": 16}, "min_tokens": 0, "dense_steps": 0.5}
    (folder / "auto.yaml").write_text(yaml.safe_dump(auto))
    (folder / "rules.yaml").write_text('steps: [{match: "0-50%", floor: 0.2}]\n')
    (folder / "short.yaml").write_text("dense_steps: 2\ndense_last: 2\n")
    (folder / "early.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\ndense_steps: 0.0\n")
    return folder


@pytest.fixture
def calibrate(models, tmp_path, monkeypatch, capsys):
    """Runs psa-calibrate; gives its exit code, its summary and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "SHAPES", {BASE: {}, "raster": {"order": "raster"}, "tiles": {"order": "tiles"}})
    Path("prompts.txt").write_text("\n".join(PROMPTS))

    def go(*arguments: str, model: str = "wan", base: str = "base.yaml"):
        given = ["--model", str(models / model), "--base-preset", str(models / base), "--prompts", "prompts.txt"]
        given += [
            *SMALL,
            "--max-prompts",
            "4",
            "--batch",
            "4",
            "--held-out",
            "1",
            "--measured-steps",
            "1",
            "-o",
            "mine.yaml",
            *arguments,
        ]
        code = run_command("psa-calibrate", cli_calibrate.calibrate_app, given)
        output = capsys.readouterr()
        return code, json.loads(output.out.splitlines()[-1]) if output.out else None, output.err

    return go


@pytest.fixture
def forbid_runs(monkeypatch):
    """From its call on no pipeline is loaded and none runs."""

    def fail(*_, **__):
        raise AssertionError("nothing should have to run again")

    def forbid():
        monkeypatch.setattr(runner, "generate_videos", fail)
        monkeypatch.setattr(runner, "load_pipeline", fail)

    return forbid
