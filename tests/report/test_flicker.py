"""The figure of change over time: what comes and goes counts, what stays does not."""

import numpy as np
import pytest

from psa_diffusers.report.flicker import flicker
from psa_diffusers.report.metrics import compare_frames


@pytest.fixture
def frames() -> np.ndarray:
    """A texture that drifts: [6, 24, 32, 3]."""
    texture = np.random.default_rng(0).uniform(0.2, 0.8, (24, 32, 3)).astype(np.float32)
    return np.stack([np.roll(texture, shift, axis=1) for shift in range(6)])


def test_equal_videos_have_none(frames):
    figures = flicker(frames, frames)
    assert (figures["mean"], figures["worst"]) == (0, 0) and figures["per_frame"] == [None, 0, 0, 0, 0, 0]
    assert figures["change"]["ratio"] == 1 and figures["change"]["reference"] == figures["change"]["other"] > 10


def test_a_brightness_that_jitters_counts_by_its_size(frames):
    """Up and down by d is a change of 2 d at every frame, also where the PSNR is that of a constant offset."""
    means = []
    for size in (0.02, 0.04):
        jitter = size * (-1) ** np.arange(6)[:, None, None, None]
        steady, jittering = (compare_frames(frames, frames + change) for change in (np.full_like(jitter, size), jitter))
        assert steady["psnr"]["mean"] == pytest.approx(jittering["psnr"]["mean"], abs=1e-3)
        assert steady["flicker"]["mean"] == pytest.approx(0, abs=1e-3)
        means.append(jittering["flicker"]["mean"])
        assert jittering["flicker"]["per_frame"][1:] == pytest.approx([2 * size * 255] * 5, rel=1e-4)
        assert jittering["flicker"]["change"]["ratio"] > 1
    assert means[1] == pytest.approx(2 * means[0], rel=1e-4)


def test_another_texture_that_stands_still_is_no_flicker():
    first, second = np.random.default_rng(0).uniform(0, 1, (2, 1, 24, 32, 3)).astype(np.float32).repeat(5, axis=1)
    figures = flicker(first, second)
    assert figures["mean"] == figures["worst"] == 0
    assert figures["change"] == {"reference": 0, "other": 0, "ratio": None}


def test_a_video_that_stands_still_where_its_reference_moves(frames):
    still = frames[:1].repeat(6, axis=0)
    figures = flicker(frames, still)
    expected = 255 * np.sqrt(np.square(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)))
    assert figures["per_frame"][1:] == pytest.approx(expected, rel=1e-5)
    assert figures["change"]["ratio"] == 0


def test_a_single_bad_frame_counts_twice_and_is_the_worst(frames):
    other = frames.copy()
    other[3] += 0.1
    figures = flicker(frames, other)
    assert figures["per_frame"][1:] == pytest.approx([0, 0, 25.5, 25.5, 0], abs=1e-3)
    assert figures["mean"] == pytest.approx(10.2, abs=1e-3) and figures["worst"] == pytest.approx(25.5, abs=1e-3)


def test_eight_bits_and_floats_agree(frames):
    pixels = (frames * 255).round().astype(np.uint8)
    dimmed = pixels // 2
    assert flicker(pixels, dimmed)["mean"] == pytest.approx(flicker(pixels / 255, dimmed / 255)["mean"], rel=1e-5)
    assert flicker(pixels, dimmed)["change"]["ratio"] == pytest.approx(0.5, abs=0.01)


def test_a_frame_that_is_not_finite_and_the_next_have_no_figure(frames):
    other = frames + 0.1
    other[2, 0, 0, 0] = np.inf
    figures = flicker(frames, other)
    assert [value is None for value in figures["per_frame"]] == [True, False, True, True, False, False]
    assert figures["mean"] == pytest.approx(0, abs=1e-3)


def test_a_video_of_one_frame_has_no_change(frames):
    figures = flicker(frames[:1], frames[:1])
    assert (figures["mean"], figures["worst"], figures["per_frame"]) == (None, None, [None])
    assert set(figures["change"].values()) == {None}
