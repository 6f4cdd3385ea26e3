"""Keeps what a calibration has measured, beside its output, so that the same command continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from psa_diffusers.errors import InputError
from psa_diffusers.files import whole_file, write_json
from psa_diffusers.report.video import to_uint8

FORMAT = 6
MEASUREMENTS = "measurements.json"


class Store:
    """A folder of measurements of one model, base preset and set of settings.

    Args:
        path: the folder; created when something is kept.
        key: everything that the measurements depend on, as JSON values, except prompts: each has its own entry.

    Raises:
        InputError: the folder holds measurements of another key, or cannot be read.
    """

    def __init__(self, path: Path, key: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        key = json.loads(json.dumps({"format": FORMAT, **key}))
        self._content: dict[str, Any] = {"key": key, "entries": {}}
        file = path / MEASUREMENTS
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: it is a file, and the measurements are to be kept in a folder of that name")
        if not file.is_file():
            return
        if overwrite:
            shutil.rmtree(path)
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            there, entries = content["key"], content["entries"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}: cannot be read ({type(error).__name__}); add --overwrite to measure anew"
            ) from error
        if there != key:
            differing = sorted(name for name in {*there, *key} if there.get(name) != key.get(name))
            raise InputError(
                f"{path}: holds measurements of other settings ({', '.join(differing)} differ); "
                "choose another --output or add --overwrite to measure anew"
            )
        self._content["entries"] = entries

    def once(self, name: tuple[Any, ...], measure: Callable[[], Any]) -> Any:
        """The value kept under a name. If there is none, call `measure` and keep its result, a JSON value."""
        digest = _digest(name)
        entries = self._content["entries"]
        if digest not in entries:
            value = measure()
            entries[digest] = {"name": list(name), "value": value}
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / MEASUREMENTS, self._content)
        return entries[digest]["value"]

    def keep_frames(self, name: tuple[Any, ...], frames: np.ndarray) -> None:
        """Keep a video, in 8 bits."""
        import torch
        from safetensors.torch import save

        self.path.mkdir(parents=True, exist_ok=True)
        with whole_file(self._frames_file(name)) as partial:
            # Not by `save_file`, whose files others than the owner cannot read, whatever the folder's are to be.
            partial.write_bytes(save({"frames": torch.from_numpy(np.ascontiguousarray(to_uint8(frames)))}))

    def frames(self, name: tuple[Any, ...]) -> np.ndarray | None:
        """A video that was kept: uint8 [frames, height, width, 3]; None if there is none, or its file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._frames_file(name)
        try:
            return load_file(file)["frames"].numpy() if file.is_file() else None
        except (SafetensorError, KeyError):
            return None

    def _frames_file(self, name: tuple[Any, ...]) -> Path:
        return self.path / f"{_digest(name)[:16]}.safetensors"


def _digest(name: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()
