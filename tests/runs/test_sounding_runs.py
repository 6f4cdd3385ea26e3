"""Sound that a pipeline makes is in its videos, and what is wrong with it is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.errors import InputError
from psa_diffusers.report.sound import read_sound
from psa_diffusers.runs.plan import make_plan
from psa_testing.sounding_pipeline import RATE, give_sound, sounding_kind
from psa_testing.tiny_runs import carry_out, edit_pipeline

SECONDS = 9 / 4


@pytest.fixture
def sounding(ask, monkeypatch, one_thread):
    """Makes a request to a pipeline with sound; arguments of `give_sound` under `given`."""
    monkeypatch.setitem(PIPELINE_KINDS, "WanPipeline", sounding_kind())

    def make(*prompts, given=None, **changes):
        edit_pipeline(monkeypatch, lambda pipe: give_sound(pipe, **(given or {})))
        return ask(*(prompts or ("a cat",)), **{"steps": 2, "frames": 9, "fps": 4, **changes})

    return make


def clicks_of(path) -> list[float]:
    sound = read_sound(path)
    loud = np.flatnonzero(np.abs(sound.samples[0]) > 0.3) / sound.rate
    return [round(at, 2) for at in loud[np.diff(loud, prepend=-1) > 0.5]]


def test_every_video_has_the_sound_and_the_side_by_side_has_denses(sounding, tmp_path):
    summary = carry_out(sounding(compare=True))
    assert summary["prompts"][0]["warnings"] == []
    folder = tmp_path / "out" / "0000-a-cat"
    for name in ("dense", "small", "side-by-side"):
        assert clicks_of(folder / f"{name}.mp4") == [0.0, 1.0, 2.0], name
    report = json.loads((folder / "report.json").read_text())
    assert report["runs"]["dense"]["sound"] == {"rate": RATE, "channels": 2, "seconds": SECONDS}
    assert report["comparison"]["sound"] == "dense"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "that of dense" in page and " muted" not in page


def test_a_pipeline_is_told_the_frames_a_second(sounding, tmp_path):
    carry_out(sounding(preset="dense", fps=8))
    assert clicks_of(tmp_path / "out" / "0000-a-cat" / "dense.mp4") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"stretch": 2.0}, "the sound lasts 4.50 s and the video 2.25 s; it is cut off"),
        ({"stretch": 0.5}, "the sound lasts 1.12 s and the video 2.25 s; it is filled up with silence"),
        ({"spoil": lambda audio: audio * float("nan")}, "the sound holds values that are not finite; they are silent"),
        ({"spoil": torch.zeros_like}, "the sound is silent throughout"),
    ],
)
def test_what_is_wrong_with_the_sound_is_told(sounding, given, told, tmp_path):
    summary = carry_out(sounding(preset="dense", given=given))
    assert f"dense: {told}" in summary["prompts"][0]["warnings"]
    assert read_sound(tmp_path / "out" / "0000-a-cat" / "dense.mp4") is not None


def test_a_pipeline_without_its_vocoder_makes_a_silent_video(sounding, tmp_path):
    summary = carry_out(sounding(preset="dense", given={"spoil": lambda audio: None}))
    assert summary["prompts"][0]["warnings"] == []
    assert read_sound(tmp_path / "out" / "0000-a-cat" / "dense.mp4") is None


def test_mono_sound_may_come_without_channels(sounding, tmp_path):
    carry_out(sounding(preset="dense", given={"spoil": lambda audio: audio.float()[:, 0].numpy()}))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    assert report["runs"]["dense"]["sound"]["channels"] == 1
    assert clicks_of(tmp_path / "out" / "0000-a-cat" / "dense.mp4") == [0.0, 1.0, 2.0]


def test_a_model_of_one_frame_rate_refuses_others(ask, monkeypatch):
    monkeypatch.setitem(PIPELINE_KINDS, "WanPipeline", replace(PIPELINE_KINDS["WanPipeline"], fps=24))
    assert make_plan(ask("a cat", fps=None)).settings.fps == 24
    with pytest.raises(InputError, match=r"--fps 25: .* makes videos of 24 frames a second only"):
        make_plan(ask("a cat", fps=25))
