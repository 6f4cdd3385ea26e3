"""Reading and writing video files, and the pictures made of two videos: side by side and filmstrip.

Frames are arrays [frames, height, width, 3], uint8 or float in [0, 1].
"""

import errno
import os
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.errors import InputError
from psa_diffusers.files import whole_file
from psa_diffusers.report.sound import Sound, add_sound, read_sound

MAX_BYTES_READ = 6 * 2**30
UNKNOWN_RATE = 25.0  # frames a second of a file that tells neither a rate nor a length; ffmpeg takes the same
# Tagged as BT.709, so that players turn the picture into the colours that went in.
COLOUR: tuple[str, ...] = ("-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int")
COLOUR += ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv")


@dataclass(frozen=True)
class Clip:
    """A decoded video: frames uint8 [frames, height, width, 3], frames a second, and its sound if it has one."""

    frames: np.ndarray
    fps: float
    sound: Sound | None = None


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames as 8-bit pixels; what is not finite becomes black."""
    if frames.dtype == np.uint8:
        return frames
    return (np.nan_to_num(frames, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).round().astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, fps: float, sound: Sound | None = None) -> None:
    """Write an mp4 (H.264, yuv420p: every browser plays it); an odd side is padded by one repeated row or column.

    Args:
        sound: None, or sound to add; it is cut or filled up to the length of the frames. It does not change the frames.

    Raises:
        OSError: it could not be written in full.
    """
    with whole_file(path) as partial:
        _write_frames(partial, frames, fps, path)
        if sound is not None:
            with whole_file(partial) as both:
                add_sound(partial, both, sound, len(frames), fps)
            _check_length(partial, len(frames), path)


def _write_frames(partial: Path, frames: np.ndarray, fps: float, path: Path) -> None:
    import imageio.v2 as imageio

    pixels = to_uint8(frames)
    odd_height, odd_width = pixels.shape[1] % 2, pixels.shape[2] % 2
    if odd_height or odd_width:
        pixels = np.pad(pixels, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    options = ["-crf", "16", "-preset", "medium", "-movflags", "+faststart", *COLOUR]
    with imageio.get_writer(
        partial.absolute(),  # ffmpeg takes a relative "a:b" for an address
        format="FFMPEG",
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=1,
        pixelformat="yuv420p",
        output_params=options,
        ffmpeg_log_level="error",
    ) as opened:
        writer: Any = opened
        for frame in pixels:
            try:
                writer.append_data(frame)
            except OSError as error:  # it carries no number, and all of the encoder's command line
                raise OSError(errno.EIO, "the video encoder failed; is the disk full?", str(path)) from error
    _check_length(partial, len(pixels), path)


def _check_length(partial: Path, frames: int, path: Path) -> None:
    """Check the number of frames written. The encoder is another process; if it fails at the end, nobody says so."""
    import imageio_ffmpeg

    try:
        written = imageio_ffmpeg.count_frames_and_secs(str(partial.absolute()))[0]
    except (OSError, RuntimeError):
        written = 0
    if written != frames:
        raise OSError(errno.EIO, f"the video encoder wrote {written} of {frames} frames; is the disk full?", str(path))


def read_video(path: Path) -> Clip:
    """Decode a whole video, every frame once, whatever it is called and however long each frame is shown.

    Frames come as they are shown: turned where the file says so, without alpha. `fps` is the mean rate.

    Raises:
        InputError: it is missing, is not a video, has sound that cannot be decoded, or would not fit in memory.
    """
    import imageio_ffmpeg

    path = Path(path)
    if not os.path.isfile(path):  # also for a name that is too long, where Path.is_file raises
        raise InputError(f"{path}: no such file")
    frames = []
    try:
        options = [_frame_rate_option(imageio_ffmpeg.get_ffmpeg_version()), "passthrough"]
        with closing(imageio_ffmpeg.read_frames(str(path.absolute()), output_params=options)) as reader:
            about: Any = next(reader)
            if about["codec"].startswith("ansi"):
                raise InputError(f"{path}: cannot be read as a video (it is text)")
            width, height = about["size"]
            room = MAX_BYTES_READ // (width * height * 3)
            for frame in reader:
                frames.append(np.frombuffer(frame, np.uint8).reshape(height, width, 3))
                if len(frames) > room:
                    raise InputError(f"{path}: longer than {room} frames of {width}x{height} do not fit in memory")
    except InputError:
        raise
    except Exception as error:  # imageio-ffmpeg raises many kinds for a file that is no video
        raise InputError(f"{path}: cannot be read as a video ({type(error).__name__})") from error
    if not frames:
        raise InputError(f"{path}: has no frames")
    # Zero is what the reader says of a rate that it does not know, "1k" among them.
    mean_rate = len(frames) / about["duration"] if about["duration"] else UNKNOWN_RATE
    return Clip(np.stack(frames), float(about["fps"] or mean_rate), read_sound(path))


def _frame_rate_option(version: str) -> str:
    """The option of ffmpeg by which it neither repeats nor drops frames. `-fps_mode` is the name since 5.1."""
    release = re.match(r"n?(\d+)\.(\d+)", version)  # builds between releases have none
    return "-vsync" if release and tuple(map(int, release.groups())) < (5, 1) else "-fps_mode"


def write_animation(path: Path, frames: np.ndarray, fps: float, width: int | None = None, quality: int = 75) -> None:
    """Write an endless animated WebP (or GIF, by the ending), for pages that play no mp4; `width` scales it."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in to_uint8(frames)]
    if width is not None:
        height = round(images[0].height * width / images[0].width)
        images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    with whole_file(path) as partial:
        images[0].save(
            partial,
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
            quality=quality,
            method=6,
        )


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices below `count`, evenly spread from the first to the last, without repeats."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(wanted, count))})
