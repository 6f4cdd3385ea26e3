"""VMAF, computed by the ffmpeg that comes with imageio-ffmpeg, if it is built with libvmaf."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.report.video import to_uint8

LOG = "vmaf.json"
# Both videos are in one picture, the reference above, so that one pipe carries them and no file has to be written.
FILTER = (
    "[0:v]split[a][b];[a]crop=iw:ih/2:0:0,{yuv}[reference];[b]crop=iw:ih/2:0:ih/2,{yuv}[main];"
    f"[main][reference]libvmaf=log_fmt=json:log_path={LOG}:n_threads={{threads}}"
)
YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p"


def vmaf(reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """VMAF (libvmaf's default model, v0.6.1) of `other` against `reference`, before any video coding.

    The model was fitted to 1080p video that coding had spoilt, judged by people, from 0 to 100; equal videos get a
    little less than 100.

    Args:
        reference, other: [frames, height, width, 3], uint8 or float in [0, 1]; compared in 8 bits.

    Returns:
        mean, worst and per_frame, and reason None; or None for the figures and the reason why they are missing.
    """
    command, reason = _ffmpeg()
    if reason is None:
        try:
            return _measure(command, to_uint8(reference), to_uint8(other))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
            reason = f"ffmpeg's libvmaf could not measure these videos ({type(error).__name__})"
    return {"mean": None, "worst": None, "per_frame": None, "reason": reason}


def _measure(command: str, reference: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    frames, height, width, _ = reference.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", "25", "-i", "-"]
    graph = FILTER.format(yuv=YUV, threads=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen(
            [command, "-hide_banner", "-loglevel", "error", *source, "-lavfi", graph, "-f", "null", "-"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdin is not None  # as it was asked for
            for pair in zip(reference, other, strict=True):
                for frame in pair:
                    process.stdin.write(np.ascontiguousarray(frame).data)
            process.stdin.close()
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, command)
        log = json.loads(Path(folder, LOG).read_text(encoding="utf-8"))
    values = [float(frame["metrics"]["vmaf"]) for frame in log["frames"]]
    if len(values) != frames:
        raise ValueError(f"{len(values)} of {frames} frames were measured")
    return {"mean": float(np.mean(values)), "worst": min(values), "per_frame": values, "reason": None}


@lru_cache(maxsize=1)
def _ffmpeg() -> tuple[str, str | None]:
    """The program, and why it cannot be used."""
    try:
        import imageio_ffmpeg

        command = imageio_ffmpeg.get_ffmpeg_exe()
        filters = subprocess.run([command, "-hide_banner", "-filters"], capture_output=True, text=True, check=True)
    except ImportError:
        return "", "imageio-ffmpeg is not installed"
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return "", f"ffmpeg cannot be run ({type(error).__name__})"
    if re.search(r"\blibvmaf\b", filters.stdout) is None:
        return command, "this ffmpeg was built without libvmaf"
    return command, None
