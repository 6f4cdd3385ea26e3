"""Whole calibrations of tiny random pipelines: targets are met, and what was measured once is kept."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from psa_diffusers import load_preset
from psa_diffusers.calibrate import runner, shapes
from psa_diffusers.calibrate.shapes import BASE
from psa_diffusers.calibrate.store import Store
from psa_diffusers.cli import calibrate as cli_calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_density_is_met_and_nothing_is_measured_twice(calibrate, forbid_runs):
    code, summary, said = calibrate("--density", "0.4", "--frames", "17")

    assert code == 0 and summary["met"] and summary["status"] == "complete"
    assert summary["verified"]["prompts"][0]["prompt"] == "a fox"
    for which in ("calibrated", "uniform"):
        assert summary["verified"][which]["density"] == pytest.approx(0.4, abs=0.01)
    assert "3 shapes of attention to compare: as the base preset; raster; tiles" in said
    trials = {row["shape"]: row for row in summary["trials"]}
    assert {BASE, "raster", "tiles"} <= trials.keys() and summary["shape"] in trials
    assert all(row["density"] == pytest.approx(0.4, abs=0.01) for row in trials.values())
    assert trials[BASE]["gain_db"] == 0 and summary["expected"]["density"] == pytest.approx(0.4, abs=0.01)
    assert "verified on 1 held-out prompts, calibrated: PSNR" in said
    psnr = [summary["verified"][name]["psnr"] for name in ("calibrated", "uniform")]
    assert summary["verified"]["gain_db"] == pytest.approx(psnr[0] - psnr[1])
    assert summary["verified"]["gain_interval_db"] is None
    preset = load_preset(Path("mine.yaml"))
    specs = preset.layer_specs(4)
    assert preset.name == "mine" and specs[0] is None and preset.dense_steps == 0.5
    written = Path("mine.yaml").read_text()
    forbid_runs()
    again, repeated, _ = calibrate("--density", "0.4", "--frames", "17")
    assert again == 0 and repeated == summary
    assert Path("mine.yaml").read_text() == written


def test_an_interrupted_calibration_continues(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []

    def interrupted(*arguments, **named):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments[3])
        return whole(*arguments, **named)

    monkeypatch.setattr(runner, "generate_videos", interrupted)
    assert calibrate("--density", "0.4")[0] == 130
    assert made == ["measuring", "trying as the base preset"]
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append(a[3]) or whole(*a, **k))
    code, summary, _ = calibrate("--density", "0.4")
    assert code == 0 and len(made) == len(set(made))
    assert {f"trying {row['shape']}" for row in summary["trials"]} <= set(made)


def test_kept_videos_that_are_gone_or_cut_off_are_made_again(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append(a[3]) or whole(*a, **k))
    first = calibrate("--density", "0.4")[1]
    files = sorted(Path("mine.calibration").glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    for file in files[1:]:
        os.truncate(file, 5000)
    store = json.loads(Path("mine.calibration", "measurements.json").read_text())
    kept = {digest: entry for digest, entry in store["entries"].items() if entry["name"][0] != "sparse"}
    Path("mine.calibration", "measurements.json").write_text(json.dumps({**store, "entries": kept}))
    made.clear()
    code, summary, _ = calibrate("--density", "0.4")
    assert code == 0 and made.count("dense, again") == 2  # the measured prompts at once, and those held out
    assert [file.read_bytes() for file in files] == before
    psnrs = [[row["psnr"] for row in each["trials"]] for each in (first, summary)]
    assert psnrs[0] == psnrs[1]


def test_what_one_device_has_measured_is_not_told_of_another(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append(a[3]) or whole(*a, **k))
    monkeypatch.setattr(runner, "device_name", lambda device: "the first")
    first = calibrate("--density", "0.4")[1]
    once = len(made)
    monkeypatch.setattr(runner, "device_name", lambda device: "the second")
    code, second, _ = calibrate("--density", "0.4")
    assert code == 0 and made[:once] == made[once:]
    steps = [summary["verified"]["prompts"][0]["dense_step"] for summary in (first, second)]
    assert steps[0] != steps[1]
    monkeypatch.setattr(runner, "device_name", lambda device: "the first")
    assert calibrate("--density", "0.4")[1] == first and len(made) == 2 * once


def test_kept_videos_can_be_read_by_whoever_can_read_the_measurements(tmp_path):
    store = Store(tmp_path / "kept", {})
    store.once(("figure",), lambda: 1)
    store.keep_frames(("video",), np.zeros((1, 2, 2, 3), np.uint8))
    modes = {file.stat().st_mode for file in (tmp_path / "kept").iterdir()}
    assert len(modes) == 1 and store.frames(("video",)).shape == (1, 2, 2, 3)


def test_the_preset_that_it_starts_from_keeps_its_rule_and_its_sharing(calibrate, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", {BASE: {}, "raster": {"order": "raster"}})
    given = {parameter.name: parameter.default for parameter in get_command(cli_calibrate.calibrate_app).params}
    assert given["base_preset"] == "psa-auto"
    code, summary, _ = calibrate("--density", "0.3", "--frames", "17", base="auto.yaml")
    assert code == 0 and summary["met"]
    for which in ("calibrated", "uniform"):
        assert summary["verified"][which]["density"] == pytest.approx(0.3, abs=0.01)
    preset = load_preset(Path("mine.yaml"))
    assert preset.share_guidance
    densities = [spec.density for spec in preset.layer_specs(4) if spec.rule == "budget"]
    assert densities == pytest.approx([0.3] * 4, abs=0.04)  # the budget of a row is rounded down to what blocks cost


def test_a_psnr_is_tried_end_to_end(calibrate):
    code, summary, said = calibrate("--target-psnr", "15")
    assert code == 0 and "tried raster: PSNR" in said
    assert "density 0.250: PSNR" in said or "density 0.25" in said
    assert summary["verified"]["calibrated"]["psnr"] > 10


def test_several_videos_are_made_at_once(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append((a[2], a[4])) or whole(*a, **k))
    more = ["--density", "0.4", "--held-out", "2"]
    code, summary, said = calibrate(*more)
    assert code == 0
    # Measured and tried, then dense, calibrated and the base preset (once more where these two differ).
    tried = 1 + len(summary["trials"])
    assert all(each == (["a cat", "a dog", "a cow", "a hen"], [0, 1, 2, 3]) for each in made[:tried])
    assert all(each == (["an owl", "a fox"], [4, 5]) for each in made[tried:]) and len(made) - tried in (2, 3)
    assert "verifying: 2 prompts, an owl" in said
    rows = summary["verified"]["prompts"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("an owl", 4), ("a fox", 5)]
    assert rows[0]["calibrated"]["psnr"] != rows[1]["calibrated"]["psnr"]
    assert rows[0]["dense_step"] == rows[1]["dense_step"] > 0
    code, _, said = calibrate(*more, "--batch", "2")
    assert code == 2 and "holds measurements of other settings (batch differ)" in said


def test_each_expert_gets_its_own_preset(calibrate):
    code, summary, said = calibrate("--density", "0.4", "--measured-steps", "9", model="experts", base="early.yaml")
    assert code == 0 and "keeps the base preset" not in said
    assert summary["output"] == ["mine.yaml", "mine-2.yaml"]
    first, second = load_preset(Path("mine.yaml")), load_preset(Path("mine-2.yaml"))
    assert (first.name, second.name) == ("mine", "mine-2")
    assert summary["verified"]["calibrated"]["density"] == pytest.approx(0.4, abs=0.03)
