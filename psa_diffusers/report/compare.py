"""Compares two videos of the same size: figures, side by side, filmstrip; and `psa-compare` for two files."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.environment import hardware, versions
from psa_diffusers.errors import InputError
from psa_diffusers.files import PROMPT_FILE, REPORT_FILE, check_name, partial_path, write_json
from psa_diffusers.report.html import write_report
from psa_diffusers.report.metrics import compare_frames, frame_faults
from psa_diffusers.report.panels import Label, filmstrip, side_by_side, write_image
from psa_diffusers.report.sound import Sound
from psa_diffusers.report.video import Clip, read_video, write_video

SIDE_BY_SIDE = "side-by-side.mp4"
FILMSTRIP = "filmstrip.png"
OUTPUTS = (SIDE_BY_SIDE, FILMSTRIP, PROMPT_FILE, REPORT_FILE)


def write_comparison(
    path: Path,
    reference: np.ndarray,
    other: np.ndarray,
    labels: tuple[Label, Label],
    fps: float,
    sounds: tuple[Sound | None, Sound | None] = (None, None),
) -> dict[str, Any]:
    """Write side-by-side.mp4 and filmstrip.png into `path`.

    Args:
        reference, other: [frames, height, width, 3], uint8 or float in [0, 1]; the reference stands left and above.
        sounds: of the two videos, each may be None; the side by side gets the first one that exists.

    Returns:
        The result of `compare_frames`, with the names of the two files under "files" and, if there is sound, the name
        of the video that it comes from under "sound".
    """
    figures = compare_frames(reference, other)
    heard = [(label.name, sound) for label, sound in zip(labels, sounds, strict=True) if sound is not None]
    write_video(path / SIDE_BY_SIDE, side_by_side(reference, other, labels), fps, heard[0][1] if heard else None)
    write_image(path / FILMSTRIP, filmstrip(reference, other, labels))
    if heard:
        figures["sound"] = heard[0][0]
    return {**figures, "files": {"side_by_side": SIDE_BY_SIDE, "filmstrip": FILMSTRIP}}


def compare_files(first: str, second: str, output: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Compare two video files, the first being the reference; return the summary.

    Raises:
        InputError: a file cannot be read, the videos differ in size or length, or results are already there.
    """
    paths = (Path(first), Path(second))
    for path in paths:
        check_name("", path)
    names = _names(paths)
    folder = Path(output) if output else Path("psa-output", f"compare-{names[0]}-{names[1]}".replace("/", "-"))
    partial = folder / ".compare.partial"
    check_name("--output", folder, partial_path(partial / SIDE_BY_SIDE))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: it is a file, not a folder")
    taken = [name for name in OUTPUTS if (folder / name).exists()]
    if taken and not overwrite:
        raise InputError(f"--output {folder}: {taken[0]} is already there; choose another folder or add --overwrite")
    clips = (read_video(paths[0]), read_video(paths[1]))
    _must_match(paths, clips)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written to ({error.strerror})") from error
    try:
        report = _write_all(partial, paths, names, clips)
        for name in OUTPUTS:
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "status": "complete",
        "output": str(folder),
        "report": str(folder / REPORT_FILE),
        "psnr": report["comparison"]["psnr"]["mean"],
        "ssim": report["comparison"]["ssim"]["mean"],
        "flicker": report["comparison"]["flicker"]["mean"],
        "lpips": report["comparison"]["lpips"]["mean"],
        "vmaf": report["comparison"]["vmaf"]["mean"],
        "frames": len(clips[0].frames),
        "warnings": report["warnings"],
    }


def _write_all(folder: Path, paths: tuple[Path, Path], names: tuple[str, str], clips: tuple[Clip, Clip]) -> dict:
    labels = (Label(names[0]), Label(names[1]))
    sounds = (clips[0].sound, clips[1].sound)
    comparison = write_comparison(folder, clips[0].frames, clips[1].frames, labels, clips[0].fps, sounds)
    count, height, width, _ = clips[0].frames.shape
    pairs = zip(names, clips, strict=True)
    warnings = [f"{name}: {fault}" for name, clip in pairs for fault in frame_faults(clip.frames)]
    if clips[0].fps != clips[1].fps:
        warnings.append(f"frames a second differ: {clips[0].fps:g} and {clips[1].fps:g}; compared frame by frame")
    report = {
        "title": f"{names[0]} and {names[1]}",
        "names": list(names),
        "runs": {},
        "videos": {},
        "files": comparison.pop("files"),
        "comparison": comparison,
        "warnings": warnings,
        "settings": {
            "reference": str(paths[0]),
            "other": str(paths[1]),
            "frames": count,
            "height": height,
            "width": width,
            "fps": clips[0].fps,
        },
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(folder / PROMPT_FILE, report)
    write_report(folder, [{**report, "folder": "."}])
    return report


def _names(paths: tuple[Path, Path]) -> tuple[str, str]:
    """Two labels that differ: the files' names, with as many folders as it takes, with their endings, or numbered."""
    whole = [Path(os.path.abspath(path)) for path in paths]  # not resolved: a link has the name that was given
    parts = [(*path.parts[1:-1], path.stem) for path in whole]
    tails = [tuple("/".join(each[-depth:]) for each in parts) for depth in range(1, 1 + max(map(len, parts)))]
    stem, kept = paths[0].stem, (paths[0].name, paths[1].name)
    for first, second in (*tails, kept):
        if first != second:
            return first, second
    return f"{stem}-1", f"{stem}-2"


def _must_match(paths: tuple[Path, Path], clips: tuple[Clip, Clip]) -> None:
    (count_a, height_a, width_a, _), (count_b, height_b, width_b, _) = clips[0].frames.shape, clips[1].frames.shape
    if (height_a, width_a) != (height_b, width_b):
        raise InputError(f"sizes differ: {paths[0]} is {width_a}x{height_a}, {paths[1]} is {width_b}x{height_b}")
    if count_a != count_b:
        raise InputError(f"lengths differ: {paths[0]} has {count_a} frames, {paths[1]} has {count_b}")
