"""psa-calibrate on tiny random pipelines: it meets a density, continues where it stopped, and refuses bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pipelines import run as run_pipeline
from tiny_pipelines import tiny_wan

from psa_diffusers import apply_psa, cli_calibrate, load_preset
from psa_diffusers.calibrate import run as calibration
from psa_diffusers.calibrate import runs, verify
from psa_diffusers.calibrate.capture import PROBED, MeasuringProcessor
from psa_diffusers.calibrate.scaling import BASE, SCALES
from psa_diffusers.cli import run_command

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--height", "160", "--width", "160", "--frames", "17", "--steps", "4", "--guidance", "1"]
BASE_YAML = (
    "block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.2, 0.35, 0.5]\n"
    "layers: [{match: 0, dense: true}]\ndense_steps: 0.5\n"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_wan(num_layers=4).save_pretrained(folder / "wan")
    experts = tiny_wan(two_stage=True, num_layers=2)
    with torch.no_grad():
        experts.transformer_2.blocks[0].attn1.to_out[0].weight.mul_(20)
    experts.save_pretrained(folder / "experts")
    (folder / "base.yaml").write_text(BASE_YAML)
    (folder / "early.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\ndense_steps: 0.0\n")
    return folder


@pytest.fixture
def calibrate(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "STRENGTHS", (1.0,))
    Path("prompts.txt").write_text("a cat\na dog\na cow\n")

    def go(*arguments: str, model: str = "wan", base: str = "base.yaml"):
        given = ["--model", str(models / model), "--base-preset", str(models / base), "--prompts", "prompts.txt"]
        given += [
            *SMALL,
            "--max-prompts",
            "1",
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


def forbid_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing should have to run again")

    monkeypatch.setattr(runs, "generate_videos", fail)
    monkeypatch.setattr(runs, "load_pipeline", fail)


def test_a_density_is_met_and_nothing_is_measured_twice(calibrate, monkeypatch, tmp_path):
    code, summary, said = calibrate("--density", "0.4")

    assert code == 0 and summary["met"] and summary["status"] == "complete"
    assert summary["verified"]["prompts"][0]["prompt"] == "a cow"
    assert summary["verified"]["calibrated"]["density"] == pytest.approx(0.4, abs=0.01)
    assert summary["expected"]["error"] <= summary["expected"]["error_uniform"] * 1.001
    assert "verified on 1 held-out prompts, calibrated: PSNR" in said
    psnr = [summary["verified"][name]["psnr"] for name in ("calibrated", "uniform")]
    assert summary["verified"]["gain_db"] == pytest.approx(psnr[0] - psnr[1])
    assert ("dB worse than one set of" in said) == (psnr[0] < psnr[1])
    assert summary["verified"]["gain_interval_db"] is None
    preset = load_preset(Path("mine.yaml"))
    specs = preset.layer_specs(4)
    assert preset.name == "mine" and specs[0] is None and preset.dense_steps == 0.5
    assert all(list(spec.thresholds) == sorted(spec.thresholds) for spec in specs[1:] if spec)
    written = Path("mine.yaml").read_text()
    forbid_runs(monkeypatch)
    again, repeated, _ = calibrate("--density", "0.4")
    assert again == 0 and repeated == summary
    assert Path("mine.yaml").read_text() == written


def test_an_interrupted_calibration_continues(calibrate, monkeypatch):
    whole = runs.generate_videos
    made = []

    def interrupted(*arguments, **named):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.extend(arguments[2])
        return whole(*arguments, **named)

    monkeypatch.setattr(runs, "generate_videos", interrupted)
    assert calibrate("--density", "0.4")[0] == 130
    monkeypatch.setattr(runs, "generate_videos", lambda *a, **k: made.extend(a[2]) or whole(*a, **k))
    assert calibrate("--density", "0.4")[0] == 0
    # Dense, calibrated and all layers alike; the last two are one run where the rules are equal.
    assert made in (["a cat", "a cow", "a cow", "a cow"], ["a cat", "a cow", "a cow"])


def test_a_psnr_is_tried_end_to_end(calibrate):
    code, summary, said = calibrate("--target-psnr", "15", "--height", "96", "--width", "96", "--frames", "9")
    assert code == 0
    assert "density 0.250: PSNR" in said
    assert summary["verified"]["calibrated"]["psnr"] > 10


def test_several_videos_are_made_at_once(calibrate, monkeypatch):
    whole, made = runs.generate_videos, []
    monkeypatch.setattr(runs, "generate_videos", lambda *a, **k: made.append((a[2], a[4])) or whole(*a, **k))
    small = ["--height", "96", "--width", "96", "--frames", "9", "--density", "0.4"]
    code, summary, said = calibrate(*small, "--batch", "2", "--held-out", "2")
    assert code == 0
    # One to measure on; then two dense, calibrated and all layers alike (once more where the rules differ).
    assert made[0] == (["a cat"], [0]) and len(made) >= 3
    assert all(each == (["a dog", "a cow"], [1, 2]) for each in made[1:])
    assert "verifying: 2 prompts, a dog" in said and "too few prompts to tell how sure that is" in said
    rows = summary["verified"]["prompts"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a dog", 1), ("a cow", 2)]
    assert rows[0]["calibrated"]["psnr"] != rows[1]["calibrated"]["psnr"]
    assert rows[0]["dense_step"] == rows[1]["dense_step"] > 0
    forbid_runs(monkeypatch)
    assert calibrate(*small, "--batch", "2", "--held-out", "2")[1] == summary
    code, _, said = calibrate(*small, "--held-out", "2")
    assert code == 2 and "holds measurements of other settings (batch differ)" in said


def test_a_speedup_is_aimed_at_with_times_of_this_machine(calibrate, monkeypatch):
    whole, densities = runs.generate_videos, []

    def timed(pipe, plan, prompts, what, seeds):
        """A sparse step takes 0.1 s and 0.9 s times its density, a dense one 1 s."""
        results = whole(pipe, plan, prompts, what, seeds)
        sparse = 1.0
        if what.startswith(("timing density", "verifying")):
            rows = next(iter(pipe.transformer.attn_processors.values())).stats().density[2:]
            density = np.mean([row[1:] for row in rows])  # the first layer is dense in any case
            densities.append(density)
            sparse = 0.1 + 0.9 * density
        for result in results:
            result.seconds |= {"per_step": [1.0, 1.0, sparse, sparse], "median_step": 1.0}
        return results

    monkeypatch.setattr(runs, "generate_videos", timed)
    code, summary, said = calibrate("--speedup", "1.5", "--height", "96", "--width", "96", "--frames", "9")
    assert code == 0 and "on this machine a dense step takes 1 s" in said
    # Two dense steps and two of 1/3 s take 2/3 of four dense ones.
    assert densities[2] == pytest.approx((1 / 3 - 0.1) / 0.9, abs=0.04)
    assert summary["verified"]["calibrated"]["speedup"] == pytest.approx(1.5, abs=0.06)
    assert summary["met"] == (summary["verified"]["calibrated"]["speedup"] >= 1.5)


def test_single_layers_are_followed_as_far_as_it_helps(calibrate, monkeypatch):
    """The videos are the pipeline's, their PSNR is made up: best where layer 1 attends about as much as layer 2."""
    monkeypatch.setattr(calibration, "STRENGTHS", (0.0, 0.5, 1.0))
    found = {}
    for best in (0.0, 0.5):
        monkeypatch.setattr(
            runs.Runs,
            "sparse",
            lambda self, videos, presets, what, best=best: [
                {"psnr": 30.0 if what == f"trying strength {best:g}" else 20.0, "density": 0.4, "step": 1.0}
                for _ in videos
            ],
        )
        code, summary, said = calibrate("--density", "0.4", "--height", "96", "--width", "96", "--frames", "9")
        assert code == 0 and summary["strength"] == best and f"strength {best:g} it is" in said
        found[best] = load_preset(Path("mine.yaml")).layer_specs(4)[1:]
    # All alike, up to the few blocks that were left over.
    spread = {best: np.ptp([spec.thresholds[-1] if spec else 1.0 for spec in specs]) for best, specs in found.items()}
    assert spread[0.0] < 0.1 and spread[0.0] <= spread[0.5]


def test_the_verdict_says_whether_it_can_tell():
    assert "0.50 dB better" in verify._verdict(0.5, 0.2) and "+0.30 to +0.70 dB" in verify._verdict(0.5, 0.2)
    assert "hold out more prompts" in verify._verdict(-0.1, 0.2) and "0.10 dB worse" in verify._verdict(-0.1, 0.2)
    assert "hold out 4 or more" in verify._verdict(0.5, None)


def test_each_expert_gets_its_own_preset(calibrate):
    code, summary, said = calibrate("--density", "0.4", "--measured-steps", "9", model="experts", base="early.yaml")
    assert code == 0 and "keeps the base preset" not in said
    assert summary["output"] == ["mine.yaml", "mine-2.yaml"]
    first, second = load_preset(Path("mine.yaml")), load_preset(Path("mine-2.yaml"))
    assert (first.name, second.name) == ("mine", "mine-2")
    # Only in the second expert does the first layer matter much more than the other.
    first_layers, second_layers = (preset.layer_specs(2) for preset in (first, second))
    assert second_layers[0] is None or second_layers[0].thresholds > first_layers[0].thresholds


def test_measuring_changes_nothing_and_tells_what_a_sparse_run_would():
    pipe = tiny_wan(num_layers=2)
    preset = load_preset("psa-3").model_copy(
        update={"min_tokens": 0, "block": {"query": 32, "key": 16}, "dense_steps": 0.0, "levels": [1, 2, 4]}
    )
    plain = run_pipeline(pipe)
    processor = MeasuringProcessor(pipe, preset, {1})
    processor.install()
    assert torch.allclose(run_pipeline(pipe), plain, atol=1e-4)
    figures = processor.figures()
    processor.restore()
    assert torch.equal(run_pipeline(pipe), plain)
    with apply_psa(pipe, preset) as psa:
        run_pipeline(pipe, guidance_scale=1.0)
        stats = psa.stats()
    assert list(figures) == stats.layers
    for index, row in enumerate(figures.values()):
        assert row["densities"][BASE] == pytest.approx(stats.density[1][index], abs=1e-6)
        assert len(row["errors"]) == len(SCALES)
        assert row["errors"][0] > row["errors"][-1] >= 0
        # At these scales the error of the output was measured itself.
        assert [row["errors"][index] for index in PROBED] == pytest.approx(row["effect"])
        assert row["effect"][0] > row["effect"][-1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target: --target-psnr, --density or --speedup"),
        (["--density", "0.2", "--speedup", "2"], "give one target"),
        (["--density", "2"], "--density 2: must be from 0.01 to 0.95"),
        (["--speedup", "2"], "--speedup 2: must be above 1 and below 2.00"),
        (["--density", "0.2", "--held-out", "3"], "3 different prompts are too few to hold out 3"),
        (["--density", "0.2", "--held-out", "0"], "--held-out 0: must be 1 or more"),
        (["--density", "0.2", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["--density", "0.2", "--verify", "prompts.txt"], "--verify: the prompt 'a cat' is also measured on"),
        (["--density", "0.2", "--base-preset", "dense"], "--base-preset dense: has no thresholds to scale"),
        (["--density", "0.2", "--base-preset", "psa-9"], "--base-preset psa-9"),
        (["--density", "0.2", "-o", "mine.txt"], "--output mine.txt: must end in .yaml"),
        (["--density", "0.2", "-o", "dense.yaml"], "--output dense.yaml"),
        (["--density", "0.2", "-o", "taken.yaml"], "--output taken.yaml: is already there"),
        (["--density", "0.2", "--measured-steps", "0"], "--measured-steps 0"),
        (["--density", "0.2", "--batch", "0"], "--batch 0: must be 1 or more"),
        (["--density", "0.2", "--steps", "0"], "--steps 0: must be from 1 to 1000"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, message, calibrate, monkeypatch):
    forbid_runs(monkeypatch)
    Path("taken.yaml").write_text("# mine\n")
    code, _, said = calibrate(*arguments)
    assert code == 2
    assert said.splitlines()[-1].startswith("psa-calibrate: error: ") and message in said
    assert Path("taken.yaml").read_text() == "# mine\n"


def test_other_settings_do_not_mix(calibrate, monkeypatch):
    Path("mine.calibration").mkdir()
    Path("mine.calibration", "measurements.json").write_text('{"key": {"seed": 7}, "entries": {}}')
    forbid_runs(monkeypatch)
    code, _, said = calibrate("--density", "0.4")
    assert code == 2
    assert "mine.calibration: holds measurements of other settings" in said
    assert "seed" in said
