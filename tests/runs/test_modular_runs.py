"""psa-generate on a pipeline that is only modular: as the ordinary pipeline with the same components."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import WanPipeline

from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.errors import InputError
from psa_diffusers.report.video import read_video
from psa_diffusers.runs.inspection import MaskPlace, inspect_run
from psa_diffusers.runs.plan import make_plan
from psa_testing.modular_wan import KIND, save_modular_wan
from psa_testing.tiny_runs import FRAMES, LAYERS, STEPS, carry_out, edit_pipeline


@pytest.fixture
def modular(ask, saved, tmp_path, monkeypatch, one_thread):
    """Makes a request to the fixtures' Wan as a modular pipeline, whose kind is changed as given."""
    save_modular_wan(tmp_path / "modular", WanPipeline.from_pretrained(saved / "wan"))

    def make(kind=None, **changes):
        monkeypatch.setitem(PIPELINE_KINDS, "WanModularPipeline", replace(KIND, **(kind or {})))
        return ask("a cat", **{"model": str(tmp_path / "modular"), **changes})

    return make


def test_it_makes_the_video_of_the_ordinary_pipeline(modular, ask, tmp_path):
    carry_out(modular(preset="dense", negative_prompt="bad"))
    carry_out(ask("a cat", preset="dense", negative_prompt="bad", output=str(tmp_path / "ordinary")))
    first, second = (read_video(tmp_path / name / "0000-a-cat" / "dense.mp4").frames for name in ("out", "ordinary"))
    assert np.abs(first.astype(int) - second).max() <= 2  # guidance is computed in another order


def test_a_whole_run_is_compared_timed_and_reported(modular, tmp_path):
    summary = carry_out(modular(compare=True))
    assert summary["status"] == "complete" and summary["prompts"][0]["density"] < 1
    assert summary["prompts"][0]["warnings"] == []
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    attention = report["runs"]["small"]["attention"]
    assert (attention["steps"], attention["dense_steps"], len(attention["layers"])) == (STEPS, 1, LAYERS)
    assert attention["fallbacks"] == {} and report["runs"]["small"]["seconds"]["sparse_steps"] == STEPS - 1
    for run in report["runs"].values():
        seconds = run["seconds"]
        assert len(seconds["per_step"]) == STEPS
        assert seconds["prepare"] + seconds["denoise"] + seconds["decode"] == pytest.approx(seconds["total"])
    assert len(report["comparison"]["psnr"]["per_frame"]) == FRAMES


def test_guidance_is_the_guiders_and_no_progress_bar_is_drawn(modular, monkeypatch, capfd):
    pipes = []
    edit_pipeline(monkeypatch, pipes.append)
    carry_out(modular(preset="dense", guidance=3.5))
    assert pipes[0].guider.config.guidance_scale == 3.5
    assert "a cat" not in capfd.readouterr().err


def test_latents_that_are_not_finite_are_told(modular, monkeypatch):
    def spoil(pipe):
        pipe.transformer.register_forward_hook(lambda module, arguments, output: (output[0] * float("nan"),))

    edit_pipeline(monkeypatch, spoil)
    summary = carry_out(modular(preset="dense"))
    assert "dense: the latents hold values that are not finite" in summary["prompts"][0]["warnings"]


def test_what_it_has_no_input_for_is_refused_and_not_left_out(modular):
    with pytest.raises(InputError, match="WanModularPipeline has no input frame_rate, so it cannot do what was asked"):
        carry_out(modular(kind={"frame_rate": "frame_rate"}, preset="dense"))


def test_a_model_with_guidance_in_its_weights(modular, monkeypatch):
    calls = []
    edit_pipeline(monkeypatch, lambda pipe: calls.append(pipe) or _record(pipe, monkeypatch, calls))
    unguided = {"guided": False, "guider": False}
    carry_out(modular(kind=unguided, preset="dense"))
    assert "negative_prompt" not in calls[1] and "guidance_scale" not in calls[1]
    with pytest.raises(InputError, match=r"--guidance 3\.0: .* takes none; guidance is in its weights"):
        make_plan(modular(kind=unguided, guidance=3.0))
    with pytest.raises(InputError, match=r"--negative-prompt bad: .* takes none; guidance is in its weights"):
        make_plan(modular(kind=unguided, negative_prompt="bad"))


def _record(pipe, monkeypatch, calls):
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda pipe, **given: calls.append(given) or call(pipe, **given))


def test_frames_within_a_range_and_steps_of_which_the_last_is_idle(modular):
    kind = {"frame_range": (9, 17), "idle_steps": 1}
    assert make_plan(modular(kind=kind, frames=9)).settings.frames == 9
    for frames in (5, 21):
        with pytest.raises(InputError, match=rf"--frames {frames}: .* makes videos of 9 to 17 frames"):
            make_plan(modular(kind=kind, frames=frames))
    with pytest.raises(InputError, match="--steps 1: must be from 2 to 1000"):
        make_plan(modular(kind=kind, frames=9, steps=1))


def test_an_inspected_run_ends_after_its_step_and_in_silence(modular, tmp_path, capfd):
    summary = inspect_run(make_plan(modular()), MaskPlace(), tmp_path / "mask.png")
    assert (summary["step"], summary["steps"]) == (3, STEPS)
    assert "Error in block" not in capfd.readouterr().err
