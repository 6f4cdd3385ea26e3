"""psa-generate on MiniMax-H3's modular pipeline: its sizes, its steps, its sound, and only the parts that it needs."""

import json

import numpy as np
import pytest

from psa_diffusers.checkpoints import resolve
from psa_diffusers.errors import InputError
from psa_diffusers.report.sound import read_sound
from psa_diffusers.report.video import read_video
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request
from psa_testing.saved_h3 import save_h3, without_text_encoder
from psa_testing.tiny_pipelines import tiny_image
from psa_testing.tiny_runs import carry_out, edit_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 8000


@pytest.fixture
def h3(tmp_path, monkeypatch):
    """Makes a request for a dense run."""
    monkeypatch.setattr(resolve, "is_installed", lambda package: True)
    with without_text_encoder():
        save_h3(tmp_path / "h3")

        def make(**changes):
            given = {"model": str(tmp_path / "h3"), "preset": "dense", "steps": 4, "height": 64, "width": 96}
            given |= {"frames": 124, "fps": 24, "output": str(tmp_path / "out"), **changes}
            return Request(prompts=("a cat",), **given)

        yield make


def made(summary, folder):
    assert summary["status"] == "complete" and summary["prompts"][0]["warnings"] == []
    return json.loads((folder / "out" / "0000-a-cat" / "report.json").read_text())["runs"]["dense"]


@pytest.mark.parametrize("image", [False, True])
def test_a_video_with_sound_from_words_and_from_an_image(h3, image, tmp_path, monkeypatch):
    loaded = []
    edit_pipeline(monkeypatch, loaded.append)
    tiny_image().save(tmp_path / "image.png")
    run = made(carry_out(h3(image=str(tmp_path / "image.png") if image else None)), tmp_path)
    clip = read_video(tmp_path / "out" / "0000-a-cat" / "dense.mp4")
    assert (clip.frames.shape, clip.fps) == ((124, 64, 96, 3), 24)
    assert len(run["seconds"]["per_step"]) == 3  # the last of four noise levels is zero
    assert (run["sound"]["rate"], run["sound"]["channels"]) == (RATE, 2)
    assert abs(clip.sound.seconds - 124 / 24) < 0.2
    assert loaded[0].transformer is not None and loaded[0].transformer_ref is None


def test_sparse_beside_dense(h3, saved, tmp_path):
    summary = carry_out(h3(preset=str(saved / "small.yaml"), compare=True, strict=True))
    assert summary["prompts"][0]["warnings"] == []
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    attention = report["runs"]["small"]["attention"]
    assert (attention["steps"], attention["dense_steps"], len(attention["layers"])) == (3, 1, 2)
    assert 0.3 < attention["density_sparse"] < 0.7 and attention["fallbacks"] == {}
    assert report["comparison"]["sound"] == "dense"
    heard = read_sound(tmp_path / "out" / "0000-a-cat" / "side-by-side.mp4")
    dense = read_sound(tmp_path / "out" / "0000-a-cat" / "dense.mp4")
    np.testing.assert_array_equal(heard.samples, dense.samples)


def test_the_sound_is_that_of_the_pipeline(h3, tmp_path, monkeypatch):
    outputs = []

    def record(pipe):
        decode = pipe.audio_vae.decode
        monkeypatch.setattr(pipe.audio_vae, "decode", lambda *a, **k: outputs.append(decode(*a, **k)) or outputs[-1])

    edit_pipeline(monkeypatch, record)
    carry_out(h3(steps=2))
    wanted = outputs[0][0][:, 0].float().numpy()
    heard = read_sound(tmp_path / "out" / "0000-a-cat" / "dense.mp4").samples
    count = min(heard.shape[1], wanted.shape[1])
    for channel in (0, 1):
        assert np.corrcoef(heard[channel, :count], wanted[channel, :count])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 120}, "--frames 120: .* makes videos of 124 to 345 frames"),
        ({"frames": 130}, r"--frames 130: must be 17k\+5, such as 124 or 141"),
        ({"height": 80}, "--height 80: .* needs a multiple of 32, such as 64 or 96"),
        ({"fps": 25}, "--fps 25: .* makes videos of 24 frames a second only"),
        ({"guidance": 2.0}, r"--guidance 2\.0: .* takes none; guidance is in its weights"),
        ({"steps": 1}, "--steps 1: must be from 2 to 1000"),
    ],
)
def test_what_its_blocks_would_refuse_is_refused_before_weights_load(h3, changes, message):
    with pytest.raises(InputError, match=message):
        make_plan(h3(**changes))


def test_what_its_text_encoder_needs_is_asked_for_before_weights_load(h3, monkeypatch):
    monkeypatch.setattr(resolve, "is_installed", lambda package: package != "torchvision")
    with pytest.raises(InputError, match="MiniMaxH3ModularPipeline needs the package torchvision, which is not inst"):
        make_plan(h3())
