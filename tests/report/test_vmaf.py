"""VMAF through ffmpeg: higher is closer, and where it cannot be had, the reason is said."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from psa_diffusers.report import vmaf as module
from psa_diffusers.report.vmaf import vmaf


@pytest.fixture(autouse=True)
def fresh_look():
    module._ffmpeg.cache_clear()
    yield
    module._ffmpeg.cache_clear()


@pytest.fixture
def frames() -> np.ndarray:
    ramp = np.linspace(0.1, 0.9, 64, dtype=np.float32)
    return np.clip(np.random.default_rng(0).normal(ramp[:, None], 0.1, (4, 48, 64, 3)), 0, 1).astype(np.float32)


def available() -> bool:
    return module._ffmpeg()[1] is None


def test_it_falls_with_noise_frame_by_frame(frames):
    if not available():
        pytest.skip("this ffmpeg was built without libvmaf")
    noise = np.random.default_rng(1).normal(0, 1, frames.shape).astype(np.float32)
    equal, little, much = (vmaf(frames, frames + level * noise) for level in (0.0, 0.05, 0.2))
    assert equal["mean"] > 97 > little["mean"] > much["mean"] + 10
    spoilt = frames.copy()
    spoilt[2] += 0.3 * noise[2]
    per_frame = vmaf(frames, spoilt)["per_frame"]
    assert len(per_frame) == 4 and int(np.argmin(per_frame)) == 2


def test_the_reference_is_the_first(frames):
    # VMAF rewards contrast that the reference lacks, so the two directions differ.
    if not available():
        pytest.skip("this ffmpeg was built without libvmaf")
    soft = (0.5 + 0.5 * (frames - 0.5)).astype(np.float32)
    assert vmaf(frames, soft)["mean"] < vmaf(soft, frames)["mean"]


def test_videos_that_are_too_small_have_a_reason():
    if not available():
        pytest.skip("this ffmpeg was built without libvmaf")
    small = np.zeros((2, 8, 8, 3), np.uint8)
    assert vmaf(small, small)["mean"] is None
    assert "could not measure" in vmaf(small, small)["reason"]


def test_an_ffmpeg_without_libvmaf_says_so(frames, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=" .. vmafmotion V->V\n"))
    expected = {"mean": None, "worst": None, "per_frame": None, "reason": "this ffmpeg was built without libvmaf"}
    assert vmaf(frames, frames) == expected
