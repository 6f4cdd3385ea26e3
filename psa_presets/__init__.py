"""Presets: every setting of a run under one name, read from YAML or made in code. They know nothing of models."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from psa_presets.errors import PresetError, show
from psa_presets.files import read_mapping, shipped_folder
from psa_presets.layers import TokenOrder
from psa_presets.model import Preset

__all__ = ["Preset", "PresetError", "TokenOrder", "choose_preset", "list_presets", "load_preset"]

DEFAULT = "psa-3"
DEFAULT_OF_DENSITY = "psa-auto"
EXAMPLE = "example"  # a file to copy that lies beside the presets; it can only be read by its path


def list_presets() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml") if path.stem != EXAMPLE)


def load_preset(preset: str | os.PathLike[str] | Preset) -> Preset:
    """Find, read and check a preset.

    Args:
        preset: the name of a shipped preset; or a path: a `Path`, text that holds a path separator or ends in .yaml or
            .yml, or the name of a file in the working directory; or a Preset, which is returned.

    Raises:
        PresetError: one line that names the file, the key, its value and what is allowed.
    """
    if isinstance(preset, Preset):
        return preset
    if isinstance(preset, os.PathLike):
        return _load_file(Path(preset))
    if not isinstance(preset, str):
        raise PresetError(f"{show(preset)} is not a preset; allowed: a name, a path or a Preset")
    if preset in (names := list_presets()):
        return _load_file(shipped_folder() / f"{preset}.yaml")
    if _looks_like_path(preset) or _is_file(preset):
        return _load_file(Path(preset))
    if preset == EXAMPLE:
        raise PresetError(
            f"not a preset but a file to copy: {shipped_folder() / 'example.yaml'}", f"preset {show(preset)}"
        )
    raise PresetError(_not_found(preset, names), f"preset {show(preset)}")


def choose_preset(preset: str | os.PathLike[str] | Preset | None, density: float | None = None) -> Preset:
    """The preset for what a user gave: a preset, a density, both, or neither.

    Args:
        preset: as for `load_preset`; None means `psa-3`, or `psa-auto` if a density is given.
        density: above 0 and up to 1; the preset is then scaled by `at_density`.

    Raises:
        PresetError: as `load_preset` and `Preset.at_density`.
    """
    if density is None:
        return load_preset(DEFAULT if preset is None else preset)
    return load_preset(DEFAULT_OF_DENSITY if preset is None else preset).at_density(density)


def _load_file(path: Path) -> Preset:
    if not os.path.lexists(os.fspath(path).replace("\0", "")):
        raise PresetError(_not_found(path.stem, list_presets()), str(path))
    settings = read_mapping(path)
    return Preset.from_file({"name": path.stem, **settings}, str(path))


def _looks_like_path(text: str) -> bool:
    return "/" in text or os.sep in text or text.lower().endswith((".yaml", ".yml"))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _not_found(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"no such file{hint}; allowed: a YAML file or one of {', '.join(names)}"
