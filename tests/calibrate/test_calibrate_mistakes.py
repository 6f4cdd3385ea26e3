"""psa-calibrate refuses bad input in one line, before anything runs."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target: --target-psnr, --density or --speedup"),
        (["--density", "0.2", "--speedup", "2"], "give one target"),
        (["--density", "2"], "--density 2: must be from 0.01 to 0.95"),
        (["--speedup", "2"], "--speedup 2: must be above 1 and below 2.00"),
        (["--density", "0.2", "--held-out", "6"], "6 different prompts are too few to hold out 6"),
        (["--density", "0.2", "--max-prompts", "3"], "--prompts: 3 different prompts to measure on are too few"),
        (["--density", "0.2", "--held-out", "0"], "--held-out 0: must be 1 or more"),
        (["--density", "0.2", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["--density", "0.2", "--verify", "prompts.txt"], "--verify: the prompt 'a cat' is also measured on"),
        (["--density", "0.2", "--base-preset", "dense"], "--base-preset dense: has no shape to compare"),
        (["--density", "0.2", "--base-preset", "psa-9"], "--base-preset psa-9"),
        (["--density", "0.2", "-o", "mine.txt"], "--output mine.txt: must end in .yaml"),
        (["--density", "0.2", "-o", "dense.yaml"], "--output dense.yaml"),
        (["--density", "0.2", "-o", "taken.yaml"], "--output taken.yaml: is already there"),
        (
            ["--density", "0.2", "-o", "taken.yaml/a.yaml"],
            "--output taken.yaml/a.yaml: cannot be written to (Not a dir",
        ),
        (
            ["--density", "0.2", "-o", "folder.yaml", "--overwrite"],
            "--output folder.yaml: it is a folder; name the YAML",
        ),
        (["--density", "0.2", "--measured-steps", "0"], "--measured-steps 0"),
        (["--density", "0.2", "--batch", "0"], "--batch 0: must be 1 or more"),
        (["--density", "0.2", "--steps", "0"], "--steps 0: must be from 1 to 1000"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, message, calibrate, forbid_runs):
    forbid_runs()
    Path("taken.yaml").write_text("# mine\n")
    Path("folder.yaml").mkdir()
    code, _, said = calibrate(*arguments)
    assert code == 2
    assert said.splitlines()[-1].startswith("psa-calibrate: error: ") and message in said
    assert Path("taken.yaml").read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        ("rules.yaml", ["--density", "0.2"], "--base-preset rules: has rules for steps, and one setting of a layer is"),
        ("short.yaml", ["--density", "0.2"], "--steps 4: with short all of them are dense"),
        ("short.yaml", ["--speedup", "2.1", "--steps", "8"], "--speedup 2.1: must be above 1 and below 2.00"),
    ],
)
def test_a_base_preset_says_which_steps_can_be_calibrated(base, target, message, calibrate, forbid_runs):
    forbid_runs()
    code, _, said = calibrate(*target, base=base)
    assert code == 2 and message in said.splitlines()[-1]


def test_other_settings_do_not_mix(calibrate, forbid_runs):
    Path("mine.calibration").mkdir()
    Path("mine.calibration", "measurements.json").write_text('{"key": {"seed": 7}, "entries": {}}')
    forbid_runs()
    code, _, said = calibrate("--density", "0.4")
    assert code == 2
    assert "mine.calibration: holds measurements of other settings" in said
    assert "seed" in said
