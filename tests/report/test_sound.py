"""Sound comes back as it was, where it was, and leaves the pictures as they were."""

import errno
from pathlib import Path

import av
import numpy as np
import pytest

from psa_diffusers.report.compare import compare_files
from psa_diffusers.report.sound import Sound, add_sound, fitted, read_sound, sound_faults
from psa_diffusers.report.video import read_video, write_video

FRAMES, FPS = 25, 8
SECONDS = FRAMES / FPS


def pictures() -> np.ndarray:
    return np.random.default_rng(0).random((FRAMES, 32, 48, 3), np.float32)


def tone(rate: int, channels: int = 2, seconds: float = SECONDS, starts: float = 2.0) -> Sound:
    """Silence, and from `starts` on a tone, softer in the second channel."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * 500 * time) * (time >= starts)
    return Sound(np.stack([wave * 0.8, wave * 0.4][:channels]).astype(np.float32), rate)


def starts(sound: Sound) -> float:
    return np.flatnonzero(np.abs(sound.samples[0]) > 0.2)[0] / sound.rate


def coded(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.video[0])]


@pytest.mark.parametrize(("rate", "channels"), [(16000, 2), (24000, 2), (32000, 2), (44100, 1), (48000, 2)])
def test_sound_survives_the_round_trip_in_step(tmp_path, rate, channels):
    sound = tone(rate, channels)
    write_video(tmp_path / "clip.mp4", pictures(), FPS, sound)
    back = read_sound(tmp_path / "clip.mp4")
    assert (back.rate, len(back.samples)) == (rate, channels)
    assert abs(back.seconds - SECONDS) < 0.08  # the last block of AAC is a whole one
    assert abs(starts(back) - 2.0) < 0.003
    count = sound.samples.shape[1]
    assert np.abs(back.samples[:, :count] - sound.samples).mean() < 0.01


def test_a_relative_path_with_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = Path("10:30", "cl:ip.mp4")
    clip.parent.mkdir()
    write_video(clip, pictures(), FPS, tone(24000))
    assert read_video(clip).sound.rate == 24000 and len(read_video(clip).frames) == FRAMES


def test_a_rate_that_aac_lacks_is_resampled(tmp_path):
    write_video(tmp_path / "clip.mp4", pictures(), FPS, tone(20011))
    back = read_sound(tmp_path / "clip.mp4")
    assert back.rate == 48000 and abs(starts(back) - 2.0) < 0.003


def test_pictures_are_coded_as_without_sound(tmp_path):
    write_video(tmp_path / "silent.mp4", pictures(), FPS)
    write_video(tmp_path / "sounding.mp4", pictures(), FPS, tone(16000))
    assert coded(tmp_path / "silent.mp4") == coded(tmp_path / "sounding.mp4")
    silent, sounding = read_video(tmp_path / "silent.mp4"), read_video(tmp_path / "sounding.mp4")
    assert (silent.frames == sounding.frames).all() and silent.fps == sounding.fps
    assert silent.sound is None and sounding.sound.rate == 16000
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["silent.mp4", "sounding.mp4"]


def test_equal_sound_makes_equal_files(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, pictures(), FPS, tone(24000))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("seconds", [0.0, 0.01, 1.0, 2 * SECONDS])
def test_sound_of_another_length_is_made_to_fit(tmp_path, seconds):
    write_video(tmp_path / "clip.mp4", pictures(), FPS, tone(16000, seconds=seconds, starts=0.0))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        lengths = [float(stream.duration * stream.time_base) for stream in container.streams]
    assert lengths == [pytest.approx(SECONDS, abs=0.001)] * 2
    assert len(read_video(tmp_path / "clip.mp4").frames) == FRAMES


def test_values_that_are_not_finite_are_silent_and_others_are_clipped():
    samples = np.array([[np.nan, np.inf, 0.5, -3.0]], np.float32)
    assert fitted(Sound(samples, 4), 1.25).samples.tolist() == [[0.0, 0.0, 0.5, -1.0, 0.0]]


def test_what_is_wrong_with_sound_is_told():
    good = tone(16000)
    assert sound_faults(good, SECONDS) == []
    assert sound_faults(tone(16000, seconds=SECONDS + 0.1), SECONDS) == []
    (long,) = sound_faults(tone(16000, seconds=4.0), SECONDS)
    assert long == "the sound lasts 4.00 s and the video 3.12 s; it is cut off"
    (short,) = sound_faults(tone(16000, seconds=2.5), SECONDS)
    assert short == "the sound lasts 2.50 s and the video 3.12 s; it is filled up with silence"
    assert sound_faults(Sound(good.samples * 0, 16000), SECONDS) == ["the sound is silent throughout"]
    spoilt = good.samples.copy()
    spoilt[0, 7] = np.nan
    assert sound_faults(Sound(spoilt, 16000), SECONDS) == [
        "the sound holds values that are not finite; they are silent"
    ]


def test_more_than_two_channels_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="sound of 3 channels; it must have one or two"):
        write_video(tmp_path / "clip.mp4", pictures(), FPS, Sound(np.zeros((3, 16000), np.float32), 16000))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_an_error_of_writing(tmp_path):
    write_video(tmp_path / "clip.mp4", pictures(), FPS)
    with pytest.raises(OSError, match="the sound could not be written") as caught:
        add_sound(tmp_path / "clip.mp4", Path("/dev/full"), tone(16000), FRAMES, FPS)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(("sounding", "heard"), [("ab", "a"), ("a", "a"), ("b", "b"), ("", None)])
def test_a_side_by_side_has_the_first_sound_that_there_is(tmp_path, sounding, heard):
    begins = {"a": 1.0, "b": 2.0}
    for name in "ab":
        sound = tone(16000, starts=begins[name]) if name in sounding else None
        write_video(tmp_path / f"{name}.mp4", pictures(), FPS, sound)
    compare_files(str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4"), output=str(tmp_path / "out"))
    joined = read_sound(tmp_path / "out" / "side-by-side.mp4")
    report = (tmp_path / "out" / "report.html").read_text()
    if heard is None:
        assert joined is None and "Sound" not in report and " muted" in report
    else:
        assert abs(starts(joined) - begins[heard]) < 0.003
        assert f"that of {heard}" in report and " muted" not in report
