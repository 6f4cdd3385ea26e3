"""The scripts of examples/, each run at toy size on the CPU as it stands; two_gpus.py in patch/test_parallel.py."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from psa_diffusers import load_preset
from psa_diffusers.calibrate import shapes
from psa_diffusers.cli import calibrate as cli_calibrate
from psa_diffusers.cli.shell import run_command
from psa_diffusers.report.video import read_video, write_video
from psa_testing.lora_files import save_lora

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TESTED = {
    "calibrate_and_use",
    "four_step_lora",
    "ltx2_sound",
    "own_model",
    "two_gpus",
    "video_qa",
    "wan",
    "wan22_experts",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def example(saved, tmp_path, monkeypatch, capsys):
    """Runs an example with small settings; what it printed, and the video that it made."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *given: str, model: str = "wan", **changes: object):
        settings = {"model": str(saved / model), "preset": str(saved / "small.yaml"), "device": "cpu"}
        settings |= {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "output": "made.mp4"}
        settings |= changes
        settings = {key: value for key, value in settings.items() if value is not None}
        runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*given, **settings)
        return capsys.readouterr().out, read_video(Path("made.mp4"))

    return run


def test_each_is_tested_and_linked():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(examples/{name}.py)" in readme for name in TESTED)


@pytest.mark.parametrize("name", sorted(TESTED - {"two_gpus"}))
def test_each_has_options_of_its_own(name, monkeypatch, capsys):
    """As a script: every setting that the other tests change is an option."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 0 and "--device" in capsys.readouterr().out


def test_one_line_on_wan(example):
    said, clip = example("wan")
    assert "density of the sparse steps: 0." in said and "against the preset: none" in said
    assert clip.frames.shape == (9, 64, 64, 3)


def test_two_experts_and_offload(example, saved):
    dense = saved / "second.yaml"
    dense.write_text((saved / "small.yaml").read_text() + "dense_steps: 1.0\n")
    said, clip = example("wan22_experts", model="experts", preset_2=str(dense))
    lines = said.splitlines()
    assert [line.split(".")[0] for line in lines] == ["transformer"] * 2 + ["transformer_2"] * 2
    assert all("did not run" in line for line in lines[:2]) and all("density 1.000" in line for line in lines[2:])
    assert len(clip.frames) == 9


def test_sound(example, tmp_path, saved):
    pytest.importorskip("diffusers.pipelines.ltx2", reason="this diffusers has no LTX-2")
    from psa_testing.families.ltx2 import tiny_ltx2

    tiny_ltx2().save_pretrained(tmp_path / "ltx2")
    said, clip = example("ltx2_sound", model=str(tmp_path / "ltx2"), num_frames=17)
    assert "density of the sparse steps: 0." in said
    assert clip.sound is not None and clip.sound.seconds == pytest.approx(17 / 24, abs=0.2)


def test_a_lora_of_four_steps(example, tmp_path):
    said, _ = example("four_step_lora", str(save_lora(tmp_path / "fast.safetensors")), num_inference_steps=None)
    assert said.startswith("1 of 4 steps dense; density of the others: 0.")


def test_calibrate_and_use(example, tmp_path, monkeypatch):
    """The command runs in this process, and compares two shapes instead of all."""
    monkeypatch.setattr(shapes, "SHAPES", {shapes.BASE: {}, "raster": {"order": "raster"}})
    run = subprocess.run

    def run_here(command, check):
        monkeypatch.setattr(subprocess, "run", run)  # ffmpeg is run by the same name
        interpreter, flag, module, *arguments = command
        assert (interpreter, flag, module, check) == (sys.executable, "-m", cli_calibrate.__name__, True)
        small = ["--guidance", "1", "--batch", "4", "--measured-steps", "1"]
        assert run_command("psa-calibrate", cli_calibrate.calibrate_app, [*arguments, *small]) == 0

    monkeypatch.setattr(subprocess, "run", run_here)
    Path("prompts.txt").write_text("a cat\na dog\na cow\na hen\nan owl\n")
    base = tmp_path / "base.yaml"
    base.write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.2, 0.35, 0.5]\n")
    settings = {"preset": None, "base_preset": str(base), "density": 0.4, "held_out": 1, "num_frames": 17}
    said, clip = example("calibrate_and_use", "prompts.txt", **settings, height=96, width=96)
    assert float(said.split()[-1]) == pytest.approx(0.4, abs=0.05) and len(clip.frames) == 17
    assert load_preset(Path("calibrated.yaml")).name == "calibrated"


def test_the_bare_operator(capsys):
    runpy.run_path(str(EXAMPLES / "own_model.py"))["main"](tokens=2048)
    said = capsys.readouterr().out.splitlines()
    errors = [float(line.split()[-1]) for line in said]
    assert "density 0.2" in said[0] and errors[0] > 0.01 and errors[1] < 1e-5


def test_a_question_about_a_video(tmp_path, monkeypatch, capsys):
    from transformers import AutoProcessor

    from psa_testing.tiny_language_models import tiny
    from psa_testing.toy_processor import ToyProcessor

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda _: ToyProcessor())
    tiny("qwen2_5_vl")[0].save_pretrained(tmp_path / "vlm")
    write_video(tmp_path / "film.mp4", np.zeros((6, 64, 64, 3), np.uint8), 8)
    (tmp_path / "small.yaml").write_text("block: {query: 32, key: 16}\nrule: budget\ndensity: 0.3\n")
    settings = {"model": str(tmp_path / "vlm"), "preset": str(tmp_path / "small.yaml"), "device": "cpu"}
    settings |= {"num_frames": 6, "min_tokens": 64, "max_new_tokens": 4}
    question = "What happens? " * 40
    runpy.run_path(str(EXAMPLES / "video_qa.py"))["main"](tmp_path / "film.mp4", question, **settings)
    assert " s, density 0." in capsys.readouterr().out.splitlines()[-1]
