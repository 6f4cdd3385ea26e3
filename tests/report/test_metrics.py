"""Figures against their closed forms, and the faults that a person would see at once."""

import sys
import types

import numpy as np
import pytest
import torch

from psa_diffusers.report.metrics import LPIPS_WEIGHTS, compare_frames, frame_faults, lpips


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.8, (4, 24, 32, 3)).astype(np.float32)


def test_psnr_of_a_known_offset(frames):
    offsets = np.array([0.1, 0.05, 0.02, 0.01], np.float32)
    figures = compare_frames(frames, frames + offsets[:, None, None, None])
    expected = -20 * np.log10(offsets)
    np.testing.assert_allclose(figures["psnr"]["per_frame"], expected, atol=1e-3)
    assert figures["psnr"]["mean"] == pytest.approx(expected.mean(), abs=1e-3)
    assert figures["psnr"]["worst"] == pytest.approx(20.0, abs=1e-3)


def test_psnr_of_one_grey_level_in_eight_bits(frames):
    pixels = (frames * 255).astype(np.uint8)
    assert compare_frames(pixels, pixels + 1)["psnr"]["mean"] == pytest.approx(20 * np.log10(255), abs=1e-3)


def test_ssim_of_flat_frames_is_its_luminance_term():
    first, second = np.full((2, 16, 16, 3), 0.4, np.float32), np.full((2, 16, 16, 3), 0.6, np.float32)
    constant = 0.01**2
    expected = (2 * 0.4 * 0.6 + constant) / (0.4**2 + 0.6**2 + constant)
    assert compare_frames(first, second)["ssim"]["mean"] == pytest.approx(expected, abs=1e-4)


def test_frames_of_exactly_the_window_have_an_ssim(frames):
    assert compare_frames(frames[:, :11, :11], frames[:, :11, :11])["ssim"]["mean"] == pytest.approx(1)
    assert compare_frames(frames[:, :10], frames[:, :10])["ssim"]["mean"] is None


def test_ssim_falls_with_noise_and_is_one_for_equal_frames(frames):
    noise = np.random.default_rng(1).normal(0, 1, frames.shape).astype(np.float32)
    values = [compare_frames(frames, frames + level * noise)["ssim"]["mean"] for level in (0.0, 0.02, 0.1)]
    assert values[0] == pytest.approx(1.0)
    assert values[0] > values[1] > values[2]


def test_equal_frames_are_counted_and_left_out_of_the_mean(frames):
    other = frames.copy()
    other[2] += 0.1
    psnr = compare_frames(frames, other)["psnr"]
    assert psnr["identical_frames"] == 3
    assert psnr["per_frame"][0] is None
    assert psnr["mean"] == pytest.approx(20.0, abs=1e-3)
    assert compare_frames(frames, frames)["psnr"]["mean"] is None


def test_a_frame_that_is_not_finite_has_no_figures(frames):
    other = frames + 0.1
    other[1, 0, 0, 0] = np.nan
    figures = compare_frames(frames, other)
    assert figures["psnr"]["per_frame"][1] is None
    assert figures["ssim"]["per_frame"][1] is None
    assert figures["psnr"]["mean"] == pytest.approx(20.0, abs=1e-3)


def test_frames_below_the_ssim_window_have_psnr_only():
    small = np.zeros((2, 8, 40, 3), np.float32)
    figures = compare_frames(small, small + 0.1)
    assert figures["ssim"]["mean"] is None
    assert figures["psnr"]["mean"] == pytest.approx(20.0, abs=1e-3)


def test_different_shapes_are_refused(frames):
    with pytest.raises(ValueError, match="differ in shape"):
        compare_frames(frames, frames[:3])


def test_lpips_says_why_it_is_not_measured(frames, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lpips", None)
    reason = "the package lpips is not installed; pip install 'psa-diffusers[lpips]'"
    assert lpips(frames, frames) == {"mean": None, "per_frame": None, "reason": reason}
    monkeypatch.setitem(sys.modules, "lpips", types.ModuleType("lpips"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "weights are not on this machine" in lpips(frames, frames)["reason"]


def test_lpips_hands_over_frames_from_minus_one_to_one(frames, monkeypatch, tmp_path):
    class Distance(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert first.shape == (1, 3, 24, 32)
            return (first - second).abs().mean()

    package = types.ModuleType("lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / LPIPS_WEIGHTS).touch()
    result = lpips(frames, frames + 0.1)
    assert result["reason"] is None
    assert result["mean"] == pytest.approx(0.2, abs=1e-5)  # twice the offset, for a range twice as wide


def test_faults(frames):
    assert frame_faults(frames) == []
    broken = frames.copy()
    broken[0, 3, 3] = np.inf
    broken[1] = 0.004
    broken[2] = (0.1, 0.5, 0.9)
    assert frame_faults(broken) == [
        "1 of 4 frames hold values that are not finite",
        "1 of 4 frames are all black",
        "1 of 4 frames are one single colour",
    ]
    assert frame_faults(np.zeros((2, 16, 16, 3), np.uint8)) == ["2 of 2 frames are all black"]
