"""Two video files against each other."""

import json

import numpy as np
import pytest

from psa_diffusers.errors import InputError
from psa_diffusers.report.compare import OUTPUTS, compare_files, write_comparison
from psa_diffusers.report.panels import GAP, MIN_PANEL_WIDTH, Label, bar_height
from psa_diffusers.report.sound import Sound
from psa_diffusers.report.video import read_video, write_video


def moving_square(count: int, size: int = 64, level: float = 0.8) -> np.ndarray:
    frames = np.full((count, size, size, 3), 0.2, np.float32)
    for number in range(count):
        frames[number, 20:40, 4 + number : 24 + number] = level
    return frames


@pytest.fixture
def clips(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(9), 8)
    write_video(tmp_path / "b.mp4", moving_square(9, level=0.7), 8)
    return str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")


def test_all_files_are_written_and_agree(clips, tmp_path):
    summary = compare_files(*clips, output=str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(OUTPUTS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    error = read_video(clips[0]).frames / 255 - read_video(clips[1]).frames / 255
    expected = np.mean(-10 * np.log10((error**2).mean(axis=(1, 2, 3))))
    assert summary["psnr"] == pytest.approx(expected, abs=1e-3)
    assert report["comparison"]["psnr"]["mean"] == summary["psnr"]
    flicker = 255 * np.sqrt((np.diff(error, axis=0) ** 2).mean(axis=(1, 2, 3)))
    assert summary["flicker"] == report["comparison"]["flicker"]["mean"] == pytest.approx(flicker.mean(), abs=1e-3)
    assert report["comparison"]["flicker"]["per_frame"] == pytest.approx([None, *flicker], abs=1e-3)
    joined = read_video(tmp_path / "out" / "side-by-side.mp4")
    assert joined.frames.shape == (9, MIN_PANEL_WIDTH + bar_height(MIN_PANEL_WIDTH), 2 * MIN_PANEL_WIDTH + GAP, 3)
    assert joined.fps == 8


def test_results_are_not_overwritten_unless_asked(clips, tmp_path):
    compare_files(*clips, output=str(tmp_path / "out"))
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(
        InputError, match=r"side-by-side\.mp4 is already there; choose another folder or add --overwrite"
    ):
        compare_files(*clips, output=str(tmp_path / "out"))
    compare_files(*clips, output=str(tmp_path / "out"), overwrite=True)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_videos_that_do_not_match_are_refused_before_anything_is_written(clips, tmp_path):
    write_video(tmp_path / "short.mp4", moving_square(8), 8)
    write_video(tmp_path / "large.mp4", moving_square(9, size=80), 8)
    with pytest.raises(InputError, match=r"lengths differ: .* has 9 frames, .* has 8"):
        compare_files(clips[0], str(tmp_path / "short.mp4"), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"sizes differ: .* is 64x64, .* is 80x80"):
        compare_files(clips[0], str(tmp_path / "large.mp4"), output=str(tmp_path / "out"))
    with pytest.raises(InputError, match="no such file"):
        compare_files(clips[0], str(tmp_path / "none.mp4"), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_equal_names_are_told_apart_and_warnings_reported(tmp_path):
    for name, level in (("one", 0.8), ("two", 0.2)):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "clip.mp4", moving_square(5, level=level), 8 if name == "one" else 12)
    summary = compare_files(
        str(tmp_path / "one" / "clip.mp4"), str(tmp_path / "two" / "clip.mp4"), output=str(tmp_path / "out")
    )
    assert summary["warnings"][0] == "two/clip: 5 of 5 frames are one single colour"
    assert "frames a second differ: 8 and 12" in summary["warnings"][1]
    assert "one/clip and two/clip" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("one/run/dense.mp4", "two/run/dense.mp4"), ["one/run/dense", "two/run/dense"]),
        (("run/dense.mp4", "two/run/dense.mp4"), ["{here}/run/dense", "two/run/dense"]),
        (("run/dense.mp4", "run/dense.m4v"), ["dense.mp4", "dense.m4v"]),
        (("run/dense.mp4", "run/../run/dense.mp4"), ["dense-1", "dense-2"]),
    ],
)
def test_labels_differ(tmp_path, monkeypatch, paths, names):
    monkeypatch.chdir(tmp_path)
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "clip.mp4", moving_square(3), 8)
        (tmp_path / "clip.mp4").replace(path)
    compare_files(*paths, output="out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["names"] == [name.format(here=tmp_path.name) for name in names]


@pytest.mark.parametrize("labels", [("dense", "dense"), ("dense", "sparse")])
def test_the_sound_is_that_of_the_first_video_that_has_some(tmp_path, labels):
    frames, rate = moving_square(8), 16000
    low, high = (
        Sound(np.sin(2 * np.pi * tone * np.arange(rate, dtype=np.float32) / rate)[None], rate) for tone in (300, 3000)
    )
    for sounds, tone in (((low, high), 300), ((None, high), 3000)):
        figures = write_comparison(tmp_path, frames, frames, (Label(labels[0]), Label(labels[1])), 8, sounds)
        assert figures["sound"] == labels[tone == 3000]
        heard = read_video(tmp_path / "side-by-side.mp4").sound
        peak = np.abs(np.fft.rfft(heard.samples[0])).argmax() * heard.rate / heard.samples.shape[1]
        assert peak == pytest.approx(tone, abs=10)


def test_a_failure_leaves_no_half_results(clips, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("psa_diffusers.report.compare.filmstrip", fail)
    with pytest.raises(KeyboardInterrupt):
        compare_files(*clips, output=str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
