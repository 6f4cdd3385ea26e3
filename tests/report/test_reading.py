"""Videos are read frame by frame, whatever their names and however long each frame is shown."""

from __future__ import annotations

from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from psa_diffusers.errors import InputError
from psa_diffusers.report.video import _frame_rate_option, read_video, write_animation, write_video

EVEN = tuple(range(0, 1200, 100))
UNEVEN = (0, 100, 200, 230, 260, 290, 600, 700, 800, 900, 1000, 1100)
NOISE = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)


def write_at(path, milliseconds):
    """NOISE without loss, each frame at its time."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264rgb", rate=1000, options={"qp": "0", "bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for pts, pixels in zip(milliseconds, NOISE, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


@pytest.mark.parametrize("times", [EVEN, UNEVEN])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_variable_frame_rate_neither_repeats_nor_drops_frames(tmp_path, name, times):
    write_at(tmp_path / name, times)
    clip = read_video(tmp_path / name)
    np.testing.assert_array_equal(clip.frames, NOISE)
    assert clip.fps == pytest.approx(12 / 1.1, abs=0.05)  # in Matroska ffmpeg says "1k"


@pytest.mark.parametrize("name", ["clip.m4v", "clip.ts", "clip.MP4", "clip"])
def test_the_ending_does_not_matter(tmp_path, name):
    write_video(tmp_path / "clip.mp4", NOISE[:3], 8)
    expected = read_video(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").rename(tmp_path / name)
    clip = read_video(tmp_path / name)
    np.testing.assert_array_equal(clip.frames, expected.frames)
    assert clip.fps == expected.fps == 8


def test_animations_and_pictures_are_videos(tmp_path):
    write_animation(tmp_path / "clip.gif", NOISE[:5], 10)
    clip = read_video(tmp_path / "clip.gif")
    assert clip.frames.shape == (5, 64, 64, 3) and clip.fps == pytest.approx(10, abs=0.1)
    Image.fromarray(NOISE[0]).save(tmp_path / "one.png")
    clip = read_video(tmp_path / "one.png")
    np.testing.assert_array_equal(clip.frames, NOISE[:1])
    assert clip.fps == 25


def test_text_is_no_video(tmp_path):
    (tmp_path / "read.nfo").write_text("ffmpeg draws text of this ending as a picture\n")
    with pytest.raises(InputError, match=r"read\.nfo: cannot be read as a video \(it is text\)"):
        read_video(tmp_path / "read.nfo")


def test_a_video_beyond_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("psa_diffusers.report.video.MAX_BYTES_READ", 2 * 64 * 64 * 3)
    write_video(tmp_path / "clip.mp4", NOISE[:3], 8)
    with pytest.raises(InputError, match="longer than 2 frames of 64x64"):
        read_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("version", "option"),
    [
        ("4.2.2-static", "-vsync"),
        ("5.0.1", "-vsync"),
        ("5.1", "-fps_mode"),
        ("7.0.2-static", "-fps_mode"),
        ("n9.0.2-17-g2a571b6068-20260930", "-fps_mode"),
        ("10.0", "-fps_mode"),
        ("N-112233-gabcdef", "-fps_mode"),
    ],
)
def test_the_option_is_one_that_the_version_knows(version, option):
    assert _frame_rate_option(version) == option


def test_an_ffmpeg_before_5_1_is_given_the_old_option(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", NOISE[:3], 8)
    given = []
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_version", lambda: "4.2.2-static")
    monkeypatch.setattr(imageio_ffmpeg, "read_frames", lambda path, output_params: given.append(output_params))
    with pytest.raises(InputError):
        read_video(tmp_path / "clip.mp4")
    assert given == [["-vsync", "passthrough"]]
