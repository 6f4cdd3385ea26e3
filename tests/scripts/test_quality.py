"""The quality experiments: their settings, one of them end to end, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quality
import torch
from quality_lab import figures, store
from quality_lab.experiments import EXPERIMENTS
from quality_lab.prompts import prompts_for
from scipy import stats

from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.errors import InputError
from psa_diffusers.report.metrics import compare_frames

ROOT = Path(__file__).resolve().parents[2]

TINY = ["--prompts", "1", "--steps", "2", "--height", "64", "--width", "64", "--frames", "9"]


def test_settings_have_names_of_their_own_and_a_baseline() -> None:
    for name, experiment in EXPERIMENTS.items():
        settings = list(experiment.settings())
        names = [setting.name for setting in settings]
        assert len(set(names)) == len(names) >= 5, name
        kinds = {setting.name: setting.content for setting in settings}
        assert settings[0].against == settings[0].name
        # A difference prompt by prompt needs the same prompts.
        assert all(kinds[setting.against] == setting.content for setting in settings), name


def test_prompts_differ_only_in_the_background() -> None:
    plain, stripes = (prompts_for(6, 1, content) for content in ("wall", "stripes"))
    assert all("wall" in prompt for prompt in plain) and all("stripes" in prompt for prompt in stripes)
    assert [prompt.split(" over ")[0] for prompt in plain] == [prompt.split(" over ")[0] for prompt in stripes]


def test_an_experiment_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture, one_thread: None) -> None:
    # Every third setting of the orders: psa-3 and psa-5 along the Hilbert curve.
    run = ["order", *TINY, "--output", str(tmp_path), "--commit", "abc"]
    quality.main([*run, "--settings", "1/3"])
    result = json.loads((tmp_path / "order.json").read_text())
    assert [row["setting"] for row in result["rows"]] == ["psa-3 hilbert", "psa-5 hilbert"]
    assert (result["settings"], result["prompts"], result["commit"], result["ssim_prompts"]) == (6, 1, "abc", 1)
    assert result["dense"]["all"]["seconds"] > 0 and result["dense"]["all"]["difference_8_pixels"] > 0
    for row in result["rows"]:
        assert 0 < row["density"] < 1 and row["density"] < row["density_run"] < 1 and 0 < row["coverage"] <= 1
        assert len(row["psnr_each"]) == 1 and 5 < row["psnr"] == row["psnr_each"][0] < 100
        assert row["psnr_ci"] is None and row["delta_psnr"] == 0 and 0 < row["ssim"] < 1
        assert 0 < row["flicker"] < 100
        assert row["preset"]["order"] == "hilbert" and row["preset"]["importance"]["query_stride"] == 8
    assert (tmp_path / "order.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["order.json", "order.png"]

    # Nothing is measured twice, and nothing measured otherwise is mixed in.
    (tmp_path / "order.png").unlink()
    capsys.readouterr()
    quality.main([*run, "--settings", "1/3"])
    assert "0 settings to measure, 2 are there" in capsys.readouterr().out
    assert json.loads((tmp_path / "order.json").read_text()) == result
    with pytest.raises(SystemExit, match="was measured with seed=20260, not 1; remove it or give another --output"):
        quality.main([*run, "--seed", "1"])
    (tmp_path / "order.png").unlink()
    quality.main(["order", "--plots-only", "--output", str(tmp_path)])
    assert (tmp_path / "order.png").exists()


def test_differences_are_paired_once_the_baseline_is_there(tmp_path: Path) -> None:
    def row(name: str, each: list[float]) -> dict:
        return {"setting": name, "against": "a", "psnr_each": each}

    kept = store.Store(tmp_path / "x.json", "x", {"model": "demo"}, ["a", "b"], device="cpu", commit="abc")
    later = kept.add(row("b", [21.0, 31.0, 26.0, 23.0]), {})
    assert later["delta_psnr"] is None and later["psnr"] == 25.25
    kept.add(row("a", [20.0, 30.0, 25.0, 22.0]), {})
    first, second = kept.rows()
    assert (first["setting"], second["setting"]) == ("a", "b")
    assert (second["delta_psnr"], second["delta_ci"]) == (1.0, 0.0) and second["psnr_ci"] > 1
    with pytest.raises(InputError, match="model='demo', not 'wan'"):
        store.Store(tmp_path / "x.json", "x", {"model": "wan"}, ["a", "b"], device="cpu")


def test_figures_agree_with_the_libraries() -> None:
    draw = torch.Generator().manual_seed(0)
    dense, video = torch.rand(2, 2, 3, 3, 16, 16, generator=draw)
    expected = [
        compare_frames(*(x.permute(0, 2, 3, 1).numpy() for x in pair)) for pair in zip(dense, video, strict=True)
    ]
    assert figures.psnr(dense, video) == pytest.approx([found["psnr"]["mean"] for found in expected], abs=1e-3)
    assert figures.ssim(dense, video) == [found["ssim"]["mean"] for found in expected]
    flickers = [found["flicker"]["mean"] for found in expected]
    assert figures.flicker(dense, video) == pytest.approx(flickers, abs=1e-3) and min(flickers) > 50
    assert figures.psnr(dense, dense) == [100, 100] and figures.flicker(dense, dense) == [0, 0]
    values = torch.randn(32, generator=draw).tolist()
    for count in (4, 8, 32):
        interval = stats.t.interval(0.95, count - 1, loc=0, scale=stats.sem(values[:count]))
        assert half_interval(values[:count]) == pytest.approx(interval[1], abs=5.1e-5)  # four digits
    assert half_interval(values[:3]) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["order", "levels", "--output", "x.json"], "is one file, and there are 2 experiments"),
        (["order", "--height", "65"], "expected multiples of"),
        (["order", "--frames", "10"], "expected one more than a multiple of 4"),
        (["order", "--plots-only", "--output", "missing"], "cannot be read"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], said: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=said) as stopped:
        quality.main(arguments)
    assert "\n" not in str(stopped.value) and not list(tmp_path.iterdir())
