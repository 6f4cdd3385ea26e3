"""Sound in video files: added to a file that has its pictures already, and read back."""

import errno
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.errors import InputError

# Rates that AAC knows; sound of any other rate is resampled to the last of them.
RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
LAYOUTS = {1: "mono", 2: "stereo"}
BITS_A_SECOND = 96_000  # a channel
CHUNK = 1 << 16
# How far sound and pictures may differ in length without a warning: sound comes in latents of 1/40 to 1/25 s.
SECONDS_APART = 0.15
SILENCE = 1e-4


@dataclass(frozen=True)
class Sound:
    """A waveform: float32 [channels, samples] in [-1, 1], one channel or two, and its samples a second."""

    samples: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[1] / self.rate

    def about(self) -> dict[str, Any]:
        """Its rate, channels and length, as JSON values."""
        return {"rate": self.rate, "channels": self.samples.shape[0], "seconds": round(self.seconds, 3)}


def sound_faults(sound: Sound, seconds: float) -> list[str]:
    """What is wrong with the sound of a video that lasts `seconds`, one line each."""
    faults = []
    if not np.isfinite(sound.samples).all():
        faults.append("the sound holds values that are not finite; they are silent")
    if not np.abs(_clean(sound.samples)).max(initial=0.0) > SILENCE:
        faults.append("the sound is silent throughout")
    if abs(sound.seconds - seconds) > SECONDS_APART:
        change = "cut off" if sound.seconds > seconds else "filled up with silence"
        faults.append(f"the sound lasts {sound.seconds:.2f} s and the video {seconds:.2f} s; it is {change}")
    return faults


def fitted(sound: Sound, seconds: float) -> Sound:
    """Sound of the video's length: cut off, or filled up with silence. Values that are not finite become silence."""
    wanted = round(seconds * sound.rate)
    samples = _clean(sound.samples[:, :wanted])
    return Sound(np.pad(samples, ((0, 0), (0, wanted - samples.shape[1]))), sound.rate)


def add_sound(silent: Path, target: Path, sound: Sound, frames: int, fps: float) -> None:
    """Write `target`, the mp4 `silent` with sound of the same length (AAC). The pictures' data is copied as it is.

    Raises:
        ValueError: the sound has neither one nor two channels.
        OSError: it could not be written in full.
    """
    import av  # every path for it is absolute: it takes a relative "a:b" for an address

    if sound.samples.shape[0] not in LAYOUTS:
        raise ValueError(f"sound of {sound.samples.shape[0]} channels; it must have one or two")
    sound = fitted(sound, frames / fps)
    try:
        with (
            av.open(str(silent.absolute())) as source,
            av.open(str(target.absolute()), "w", format="mp4", options={"movflags": "+faststart"}) as output,
        ):
            pictures = source.streams.video[0]
            copied = output.add_stream_from_template(pictures)
            encoder = _encoder(output, sound)
            # In the order of time, so that players need not seek.
            packets = heapq.merge(_copies(source, pictures, copied), _encoded(encoder, sound), key=_time)
            for packet in packets:
                output.mux(packet)
    except av.FFmpegError as error:
        raise OSError(errno.EIO, f"the sound could not be written ({error}); is the disk full?", str(target)) from error


def read_sound(path: Path) -> Sound | None:
    """The sound of a video file; None if it has none.

    Raises:
        InputError: it has sound that cannot be decoded.
    """
    import av

    try:
        with av.open(str(path.absolute())) as source:
            if not source.streams.audio:
                return None
            stream = source.streams.audio[0]
            layout = "mono" if stream.channels == 1 else "stereo"
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=stream.rate)
            pieces = [piece.to_ndarray() for frame in source.decode(stream) for piece in resampler.resample(frame)]
            pieces += [piece.to_ndarray() for piece in resampler.resample(None)]
    except av.FFmpegError as error:
        raise InputError(f"{path}: its sound cannot be read ({type(error).__name__})") from error
    return Sound(np.concatenate(pieces, axis=1), stream.rate) if pieces else None


def _encoder(output: Any, sound: Sound) -> Any:
    channels = sound.samples.shape[0]
    rate = sound.rate if sound.rate in RATES else RATES[-1]
    encoder = output.add_stream("aac", rate=rate, layout=LAYOUTS[channels])
    encoder.bit_rate = channels * min(BITS_A_SECOND, 4 * rate)
    return encoder


def _copies(source: Any, pictures: Any, copied: Any) -> Iterator[Any]:
    for packet in source.demux(pictures):
        if packet.dts is not None:  # the last one is empty
            packet.stream = copied
            yield packet


def _encoded(encoder: Any, sound: Sound) -> Iterator[Any]:
    import av

    for start in range(0, sound.samples.shape[1], CHUNK):
        piece = np.ascontiguousarray(sound.samples[:, start : start + CHUNK])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=encoder.layout.name)
        frame.sample_rate, frame.pts, frame.time_base = sound.rate, start, Fraction(1, sound.rate)
        yield from encoder.encode(frame)
    yield from encoder.encode(None)


def _time(packet: Any) -> Fraction:
    return packet.dts * packet.time_base


def _clean(samples: np.ndarray) -> np.ndarray:
    return np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).clip(-1, 1)
