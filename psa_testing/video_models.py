"""Which classes of diffusers denoise videos, read from its source: importing all of it takes long, and needs more
packages than the tests have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# A model's class and the classes it is derived from.
_CLASS = re.compile(r"^class (\w+)\(([^)]*)\):", re.MULTILINE)
_DENOISER = re.compile(r"Transformer|UNet")
_ONLY_IMAGES_OR_SOUND = re.compile(r"[12]D")
_VIDEO_BY_NAME = re.compile(r"Transformer3DModel$|^UNet3D")
# An output of a pipeline with frames, and an output of modular blocks.
_OUTPUT = re.compile(r"^class (\w+Output)\(BaseOutput\):((?:\n(?:[ \t].*)?)*)", re.MULTILINE)
_FRAMES = re.compile(r"^\s+(?:frames|videos?)\s*:", re.MULTILINE)
_MODULAR_VIDEOS = re.compile(r"OutputParam(?:\.template)?\(\s*\"(?:videos?|frames)\"")
_DENOISER_PARAMETER = re.compile(r"^\s+(?:transformer|unet)\s*:", re.MULTILINE)


def video_models(diffusers: Path) -> dict[str, list[str]]:
    """The classes that denoise videos, and the files that say so.

    A class does that if its name says so, if a pipeline whose output has frames names it, or if modular blocks whose
    output has videos do. A pipeline that takes a denoiser of no known class stands there itself, by its file's name.

    Args:
        diffusers: the folder of the package.
    """
    models: dict[str, list[str]] = {}
    denoisers = set()
    for file, text in _files(diffusers, "models/transformers", "models/unets"):
        for name, bases in _CLASS.findall(text):
            if "ModelMixin" in bases and _DENOISER.search(name) and not _ONLY_IMAGES_OR_SOUND.search(name):
                denoisers.add(name)
                if _VIDEO_BY_NAME.search(name):
                    models.setdefault(name, []).append(file)
    pipelines = list(_files(diffusers, "pipelines"))
    outputs = {name for _, text in pipelines for name, body in _OUTPUT.findall(text) if _FRAMES.search(body)}
    for file, text in pipelines:
        words = set(re.findall(r"\w+", text))
        if words & outputs and not file.endswith(("__init__.py", "pipeline_output.py")):
            named = words & denoisers
            if not named and _DENOISER_PARAMETER.search(text):
                named = {Path(file).name}
            for name in named:
                models.setdefault(name, []).append(file)
    modular = list(_files(diffusers, "modular_pipelines"))
    of_videos = {file.split("/")[1] for file, text in modular if _MODULAR_VIDEOS.search(text)}
    for file, text in modular:
        if file.split("/")[1] in of_videos:
            for name in set(re.findall(r"\w+", text)) & denoisers:
                models.setdefault(name, []).append(file)
    return models


def _files(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    """The path in the package, and the text, of each file of these folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
