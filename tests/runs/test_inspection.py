"""psa-inspect: the mask of one layer, head and step as a picture, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from typer.testing import CliRunner

from psa_diffusers import Preset
from psa_diffusers.cli import inspect as cli_inspect
from psa_diffusers.cli.generate import run_command
from psa_diffusers.patch.masks import BlockMask
from psa_diffusers.report.mask_plot import level_colours, mask_figure
from psa_kernels import AttentionSpec
from psa_presets import TokenOrder
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_wan(num_layers=2).save_pretrained(folder / "wan")
    (folder / "small.yaml").write_text(
        "block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.5]\nlayers: [{match: 0, dense: true}]\n"
    )
    (folder / "ends.yaml").write_text(
        "block: {query: 32, key: 16}\nmin_tokens: 0\ndense_steps: 1\ndense_last: 1\nlayers: [{match: 0, dense: true}]\n"
        "steps: [{match: 2, dense: true}, {match: 4, dense: false}, {match: 4, thresholds: [0.9, 0.9, 0.9]}]\n"
    )
    return folder


def inspect(model, *arguments: str, output="mask.png", preset="small.yaml") -> int:
    where = ["--model", str(model / "wan"), "--preset", str(model / preset) if preset.endswith("yaml") else preset]
    return run_command("psa-inspect", cli_inspect.inspect_app, [*where, *SMALL, "-o", output, *arguments])


def test_a_mask_is_drawn_and_its_density_printed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect(model, "--head", "1", "--step", "2", "a cat", output="sub/mask.png") == 0
    output = capsys.readouterr()
    summary = json.loads(output.out.splitlines()[-1])
    # 32 tokens: one query block of 32, two key blocks of 16; the first is exact, the other skipped.
    assert (summary["layer"], summary["head"], summary["step"], summary["steps"]) == ("blocks.1", 1, 2, 4)
    assert (summary["grid"], summary["query_blocks"], summary["key_blocks"]) == ([2, 4, 4], 1, 2)
    assert summary["density"] == summary["coverage"] == 0.5
    assert summary["shares"] == {"exact": 0.5, "pooled 2\u00d7": 0.0, "pooled 4\u00d7": 0.0, "skipped": 0.5}
    assert "density 0.500, coverage 0.500" in output.err
    with Image.open(tmp_path / "sub" / "mask.png") as picture:
        assert picture.width > 1000


def test_a_mask_is_that_of_the_density_asked_for(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect(model, "--density", "1", "--step", "2", "a cat") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["density"] == 1
    assert inspect(model, "--density", "0", "--step", "2", "a cat", output="other.png") == 2
    assert "psa-inspect: error: --density 0: must be above 0 and up to 1" in capsys.readouterr().err


ORDER = TokenOrder("hilbert", (4, 4, 4))


def test_colours_stand_where_their_blocks_are():
    levels = np.array([[[0, 1, 2, 3], [3, 3, 3, 0]]])
    preset = Preset(name="mine")
    mask = BlockMask("blocks.0", 2, 8, (1, 16, 16), preset, AttentionSpec(), ORDER, 0, 0, levels)
    figure = mask_figure(mask, "costs $5 and $6")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    axes = figure.axes[0]
    assert all(float(tick).is_integer() for tick in (*axes.get_xticks(), *axes.get_yticks()))
    for row in range(2):
        for column in range(4):
            x, y = axes.transData.transform((column, row))
            found = pixels[pixels.shape[0] - 1 - round(y), round(x)]
            assert np.allclose(found, level_colours(3)[levels[0, row, column]], atol=0.01)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["exact: 25.0%", "pooled 2\u00d7: 12.5%", "pooled 4\u00d7: 12.5%", "skipped: 50.0%"]
    assert "density 0.344" in axes.get_title(loc="left")  # (2 + 1/2 + 1/4) / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "--step 3: the sparse steps of this run are 2, 4 to 5 (3 of 6 are dense with ends)"),
        (["--step", "6"], "--step 6: the sparse steps of this run are 2, 4 to 5 (3 of 6 are dense with ends)"),
        (["--step", "2", "--layer", "0"], "--layer 0: ends keeps this layer dense"),
        (["--steps", "2"], "--steps 2: with ends all of them are dense"),
    ],
)
def test_steps_that_are_dense_at_both_ends_and_by_rules_have_no_mask(
    arguments, message, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert inspect(model, "--steps", "6", *arguments, "a cat", preset="ends.yaml") == 2
    assert "psa-inspect: error: " + message in capsys.readouterr().err


def test_a_mask_is_that_of_the_step_s_rules(model, tmp_path, capsys, monkeypatch):
    """At the fifth step a rule for steps makes the first layer sparse, and has it keep both key blocks."""
    monkeypatch.chdir(tmp_path)
    assert inspect(model, "--steps", "6", "--step", "5", "--layer", "0", "a cat", preset="ends.yaml") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["layer"], summary["step"], summary["density"]) == ("blocks.0", 5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "0", "a cat"], "--layer 0: small keeps this layer dense"),
        (["--layer", "2", "a cat"], "--layer 2: {model} has the layers 0 to 1"),
        (["--step", "1", "a cat"], "--step 1: the sparse steps of this run are 2 to 4"),
        (["--step", "5", "a cat"], "--step 5: the sparse steps"),
        (["--head", "-1", "a cat"], "--head -1: {model} has the heads 0 to 1"),
        (["--head", "2", "a cat"], "--head 2: {model} has the heads 0 to 1"),
        (["-o", "mask.jpg", "a cat"], "--output mask.jpg: must end in .png"),
        (["--preset", "dense", "a cat"], "--preset dense: dense attention has no block mask"),
        (
            ["--preset", "psa-3", "a cat"],
            "there is no mask to draw: attention would be dense: the sequence of 32 tokens is shorter",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect(model, *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "psa-inspect: error: " + message.format(model=model / "wan") in error
    assert "Traceback" not in error
    assert not (tmp_path / "mask.png").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file/mask.png", "--output file/mask.png: cannot be written to (Not a directory)"),
        ("file/sub/mask.png", "--output file/sub/mask.png: cannot be written to (Not a directory)"),
        ("folder.png", "--output folder.png: it is a folder; name the PNG to write"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_run(
    output, message, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("psa_diffusers.runs.inspection.load_pipeline", None)
    Path("file").touch()
    Path("folder.png").mkdir()
    assert inspect(model, "--overwrite", "a cat", output=output) == 2
    assert capsys.readouterr().err == f"psa-inspect: error: {message}\n"


def test_a_file_is_not_overwritten_unless_asked(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mask.png").write_text("mine")
    assert inspect(model, "a cat") == 2
    assert "mask.png: is already there" in capsys.readouterr().err
    assert inspect(model, "--overwrite", "a cat") == 0
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert inspect(model, "a cat") == 2
    assert "matplotlib is not installed; pip install 'psa-diffusers[plots]'" in capsys.readouterr().err


def test_the_help_names_the_options():
    result = CliRunner().invoke(cli_inspect.inspect_app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in ("--layer", "--head", "--step", "--output", "--preset", "psa-diffusers[plots]"):
        assert option in result.output
