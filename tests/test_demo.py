"""The demo model: its grammar, renderer, pixel checks, training script, and the bundled weights."""

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import train_demo
from demo import autoencoder, denoiser, text
from demo.captions import (
    COLOURS,
    MOTIONS,
    SHAPES,
    TEXTURES,
    Background,
    Scene,
    Thing,
    caption,
    is_held_out,
    words,
)
from demo.checks import judge, sightings
from demo.convolution import frame_convolutions
from demo.scenes import position, sample_scenes
from demo.videos import render

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "psa_diffusers" / "demo"


def test_a_caption_says_what_the_scene_holds():
    scene = Scene(
        (
            Thing("red", "striped", "circle", "moving right", "large"),
            Thing("orange", "solid", "star", "bouncing", "small"),
        ),
        Background("green", "checkerboard", dark=True, drifting=True),
    )
    assert caption(scene) == (
        "a large red striped circle moving right and a small orange star bouncing "
        "over a drifting dark green checkerboard"
    )
    plain = Scene((Thing("orange", "solid", "heart", "growing", "small"),), Background("blue", "stripes"))
    assert caption(plain) == "a small orange heart growing over blue stripes"


def test_every_caption_word_has_a_token():
    vocabulary = set(words()) | {"something"}
    rng = random.Random(0)
    for scene in sample_scenes(200, 1):
        assert set(caption(scene, rng).split()) <= vocabulary
        assert len(caption(scene, rng).split()) < text.TRAINED_TOKENS


def test_training_never_shows_a_held_out_combination():
    combinations = [
        Thing(c, t, s, m, "small") for c in COLOURS for t in TEXTURES for s in SHAPES for m in MOTIONS
    ]  # fmt: skip
    assert 0.08 < sum(map(is_held_out, combinations)) / len(combinations) < 0.17
    assert not any(is_held_out(thing) for scene in sample_scenes(300, 2) for thing in scene.things)
    assert all(is_held_out(thing) for scene in sample_scenes(50, 2, held_out=True) for thing in scene.things)


def test_objects_stay_in_the_frame():
    for scene in sample_scenes(200, 3):
        for thing in scene.things:
            for time in (0.0, 0.3, 0.7, 1.0):
                x, y, radius = position(thing, time)
                assert radius * 0.9 < min(x, y) and max(x, y) < 1 - radius * 0.9


def test_rendering_is_deterministic_and_in_range():
    first, second = (render(sample_scenes(6, 4), frames=5, side=48) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (6, 3, 5, 48, 48)
    assert first.min() >= -1 and first.max() <= 1
    alone = render(sample_scenes(6, 4)[2:3], frames=5, side=48)
    assert torch.allclose(alone[0], first[2], atol=1e-5)


def test_checks_pass_on_true_videos_and_fail_on_wrong_captions():
    scenes = sample_scenes(16, 5)
    videos = render(scenes, frames=17, side=96)
    for video, scene in zip(videos, scenes, strict=True):
        found = sightings(video)
        verdict = judge(found, scene)
        assert verdict.colours_right == verdict.motions_right == verdict.things, caption(scene)
        for change in ("colour", "motion"):
            wrong = judge(found, _with_another(scene, change))
            assert wrong.motions_right == 0, (caption(scene), change)
        assert judge(found, _with_another(scene, "colour")).colours_right == 0


def test_checks_see_no_object_in_a_background():
    scene = sample_scenes(1, 6)[0]
    empty = render([dataclasses.replace(scene, things=())], frames=5, side=48)
    assert sightings(empty[0]) == []


def test_one_biased_key_acts_like_all_the_padding():
    """The cross-attention of training equals what WanPipeline computes over 512 padded tokens."""
    torch.manual_seed(0)
    tokenizer = text.build_tokenizer()
    encoder = text.build_text_encoder(len(tokenizer)).eval()
    model = denoiser.build_denoiser(layers=1).eval()
    torch.nn.init.normal_(model.proj_out.weight)
    ids = text.tokenize(tokenizer, ["a red circle moving left", ""])
    latents, level = torch.randn(2, 16, 2, 4, 4), torch.tensor([500.0, 900.0])
    with torch.no_grad():
        short, bias = text.embed(encoder, ids, torch.tensor([512, 512]))
        padded = torch.nn.functional.pad(short[:, : ids.shape[1]], (0, 0, 0, 512 - ids.shape[1]))
        expected = model(latents, level, padded, return_dict=False)[0]
        cross_attention = denoiser.BiasedCrossAttention()
        cross_attention.bias = bias
        model.blocks[0].attn2.set_processor(cross_attention)
        actual = model(latents, level, short, return_dict=False)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_fast_autoencoder_passes_are_the_pipelines_own():
    torch.manual_seed(0)
    vae = autoencoder.build_autoencoder(4, 4).eval()
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mean
        decoded = vae.decode(expected).sample
        with frame_convolutions():
            torch.testing.assert_close(autoencoder.encode(vae, video)[0], expected, rtol=1e-4, atol=1e-5)
            actual = autoencoder.decode(vae, expected).clamp(-1, 1)
    torch.testing.assert_close(actual, decoded, rtol=1e-4, atol=1e-5)


def test_words_know_their_part_of_the_sentence():
    tokenizer = text.build_tokenizer()
    ids = text.tokenize(tokenizer, ["a red star circling and a blue heart bouncing over a green wall"])
    assert text.parts(tokenizer, ids)[0, :14].tolist() == [0] * 4 + [1] * 5 + [2] * 5


def test_training_runs_and_resumes(tmp_path, monkeypatch):
    from diffusers import WanPipeline

    seconds = ["--short-seconds", "0.5", "--full-seconds", "0.5"]
    first = ["--output", str(tmp_path / "first"), "--text-seconds", "0.5", "--vae-seconds", "0.5", "--keep-rate"]
    second = ["--output", str(tmp_path / "second"), "--resume", str(tmp_path / "first"), "--seed", "1"]
    for arguments in (first, second):
        monkeypatch.setattr(sys, "argv", ["train_demo.py", "--tiny", *seconds, *arguments])
        train_demo.main()
    pipeline = WanPipeline.from_pretrained(tmp_path / "second")
    assert _generate(pipeline).isfinite().all()


def test_the_bundled_folder_is_small_and_safe():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert json.loads((WEIGHTS / "model_index.json").read_text())["_class_name"] == "WanPipeline"


def test_the_bundled_model_loads_offline_and_generates(monkeypatch):
    from diffusers import WanPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = WanPipeline.from_pretrained(WEIGHTS)
    frames = _generate(pipeline)
    assert frames.shape == (1, 9, 3, 64, 64)
    assert frames.isfinite().all() and frames.std() > 0.01


@pytest.mark.parametrize("typed", ["A Large RED circle, moving right.", "a large red circle moving right"])
def test_the_tokenizer_takes_prompts_as_people_type_them(typed):
    tokenizer = text.build_tokenizer()
    assert tokenizer(typed).input_ids == tokenizer("a large red circle moving right").input_ids


def _generate(pipeline) -> torch.Tensor:
    """[1, frames, 3, height, width] with the pipeline's defaults but for size and steps."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    return pipeline("a red circle moving right", generator=generator, output_type="pt", **size).frames


def _with_another(scene: Scene, name: str) -> Scene:
    """The same scene with a colour or motion of every object that none of its objects has."""
    values = {"colour": COLOURS, "motion": MOTIONS}[name]
    taken = {getattr(thing, name) for thing in scene.things}
    free = [value for value in values if value not in taken]
    return dataclasses.replace(
        scene, things=tuple(dataclasses.replace(thing, **{name: free[i]}) for i, thing in enumerate(scene.things))
    )
