"""Videos come back as they were written, and the joined pictures are complete and in step."""

import numpy as np
import pytest
from PIL import Image

from psa_diffusers.errors import InputError
from psa_diffusers.files import whole_file
from psa_diffusers.report.panels import GAP, MIN_PANEL_WIDTH, Label, bar_height, filmstrip, side_by_side, write_image
from psa_diffusers.report.video import evenly, read_video, to_uint8, write_animation, write_video

LABELS = (Label("dense", ("71.3 s",)), Label("psa-3", ("58.0 s", "density 0.44")))


def grey_levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is the grey i / count."""
    return np.broadcast_to((np.arange(count) / count)[:, None, None, None], (count, height, width, 3)).astype(
        np.float32
    )


@pytest.mark.parametrize("colour", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.5, 0.8), (1, 1, 1), (0, 0, 0)])
def test_colours_survive_the_round_trip(tmp_path, colour):
    frames = np.ones((5, 32, 32, 3), np.float32) * np.array(colour, np.float32)
    write_video(tmp_path / "clip.mp4", frames, 16)
    clip = read_video(tmp_path / "clip.mp4")
    assert clip.frames.shape == (5, 32, 32, 3)
    assert clip.fps == 16
    assert np.abs(clip.frames / 255 - frames).max() < 0.02


def test_frames_stay_in_order(tmp_path):
    frames = grey_levels(17)
    write_video(tmp_path / "clip.mp4", frames, 24)
    seen = read_video(tmp_path / "clip.mp4").frames.mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(seen, frames[:, 0, 0, 0], atol=0.02)


def test_odd_sides_are_padded_by_repeating(tmp_path):
    write_video(tmp_path / "clip.mp4", np.full((3, 33, 47, 3), 0.5, np.float32), 8)
    frames = read_video(tmp_path / "clip.mp4").frames
    assert frames.shape == (3, 34, 48, 3)
    assert np.abs(frames.astype(int) - 128).max() < 6


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match=r".*"):
        write_video(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 7), np.float32), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_is_not_a_video_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(InputError, match="cannot be read as a video"):
        read_video(tmp_path / "text.mp4")


def test_values_that_are_not_finite_become_black():
    frames = np.array([np.nan, np.inf, -np.inf, 0.5, 2.0, -1.0], np.float32)
    assert to_uint8(frames).tolist() == [0, 255, 0, 128, 255, 0]


@pytest.mark.parametrize(("height", "width"), [(32, 48), (192, 192), (50, 401), (64, 500)])
def test_side_by_side_keeps_every_frame_and_has_the_promised_size(height, width):
    left, right = grey_levels(6, height, width), 1 - grey_levels(6, height, width)
    joined = side_by_side(left, right, LABELS)
    scale = max(1, -(-MIN_PANEL_WIDTH // width))
    bar = bar_height(width * scale)
    expected = (height * scale + bar, 2 * width * scale + GAP)
    assert joined.shape == (6, *(side + side % 2 for side in expected), 3)
    body = joined[:, bar + 8 : bar + height * scale - 8]
    in_left, in_right = body[:, :, 8 : width * scale - 8], body[:, :, width * scale + GAP + 8 : 2 * width * scale]
    np.testing.assert_allclose(in_left.mean(axis=(1, 2, 3)) / 255, left[:, 0, 0, 0], atol=0.01)
    np.testing.assert_allclose(in_right.mean(axis=(1, 2, 3)) / 255, right[:, 0, 0, 0], atol=0.01)


def test_labels_are_drawn_and_do_not_leave_their_panel():
    black = np.zeros((2, 64, MIN_PANEL_WIDTH, 3), np.float32)
    bare = side_by_side(black, black, (Label(""), Label("")))
    left_only = side_by_side(black, black, (Label("a name that is far too long for its panel " * 3), Label("")))
    different = (bare != left_only).any(axis=(0, 1, 3))
    assert different[:MIN_PANEL_WIDTH].any()
    assert not different[MIN_PANEL_WIDTH:].any()


def test_two_videos_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        side_by_side(grey_levels(3), grey_levels(4), LABELS)


def test_filmstrip_has_the_first_video_above_the_second(tmp_path):
    strip = filmstrip(grey_levels(33), 1 - grey_levels(33), LABELS)
    pixels = np.asarray(strip)
    middle = pixels.shape[0] // 2
    top, bottom = pixels[middle - 20, :, 0].astype(int), pixels[-10, :, 0].astype(int)
    assert top[5] < 10 and bottom[5] > 245  # first frames: black above, white below
    assert top[-5] > 245 * 32 / 33 - 8 and bottom[-5] < 20  # last frames
    write_image(tmp_path / "strip.png", strip)
    assert Image.open(tmp_path / "strip.png").size == strip.size


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_animation_plays_every_frame(tmp_path, name):
    write_animation(tmp_path / name, grey_levels(5), 10, width=24)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 5
        assert image.size == (24, 16)
        assert image.info["loop"] == 0


def test_evenly_spread_indices():
    assert evenly(33, 6) == [0, 6, 13, 19, 26, 32]
    assert evenly(3, 6) == [0, 1, 2]
    assert evenly(1, 6) == [0]
