"""The YAML files that psa-calibrate writes, and knows again, so that it overwrites no other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from psa_diffusers.files import whole_file
from psa_diffusers.presets import Preset

HEADER = "# Made by psa-calibrate:"


def write(path: Path, preset: Preset | None, note: str) -> None:
    """Write a preset under a first line that says so; nothing where there is none."""
    if preset is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = preset.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    with whole_file(path) as partial:
        # The digest tells a file that was edited since, which is not to be overwritten.
        partial.write_text(f"{HEADER} {note} [{_digest(text)}]\n{text}", encoding="utf-8")


def is_own(path: Path) -> bool:
    """Whether a file is the result of an earlier calibration, as it was written."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return first.startswith(HEADER) and first.endswith(f"[{_digest(rest)}]")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
