"""The result of a calibration: a preset and its YAML file, which can be recognised, so that no other is overwritten."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from psa_diffusers.calibrate.choose import Solution
from psa_diffusers.calibrate.scaling import scaled_settings
from psa_diffusers.calibrate.shapes import SHAPES, shaped
from psa_diffusers.files import whole_file
from psa_presets import Preset

HEADER = "# Made by psa-calibrate:"


def make_preset(base: Preset, solution: Solution | None, num_layers: int, name: str, source: str) -> Preset:
    """The base preset with a solution's settings for each layer; without rules if all layers have the same.

    Args:
        solution: None leaves the base preset's settings as they are.
    """
    preset = base.replace(name=name, source=source)
    if solution is None:
        return preset
    # A solution does not contain layers that the base preset keeps dense.
    specs = {
        (shape, layer): spec
        for shape in set(solution.shapes.values())
        for layer, spec in enumerate(shaped(base, shape).layer_specs(num_layers))
        if spec is not None
    }
    alike: dict[str, list[int]] = {}
    for layer, shape in sorted(solution.shapes.items()):
        changes = {**SHAPES[shape], **scaled_settings(specs[shape, layer], solution.scales[layer])}
        alike.setdefault(json.dumps(changes), []).append(layer)
    if len(alike) == 1 and not base.layers and len(solution.shapes) == num_layers:
        return preset.replace(**_at_the_top(base, json.loads(next(iter(alike)))))
    rules: list[Any] = [
        {"match": ",".join(map(str, layers)), **json.loads(changes)} for changes, layers in alike.items()
    ]
    return preset.replace(layers=[*base.layers, *rules])


def write(path: Path, preset: Preset | None, note: str) -> None:
    """Write a preset below a first line that says who made it; do nothing for None."""
    if preset is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = preset.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    with whole_file(path) as partial:
        # The digest shows whether the file was edited since; then it must not be overwritten.
        partial.write_text(f"{HEADER} {note} [{_digest(text)}]\n{text}", encoding="utf-8")


def is_own(path: Path) -> bool:
    """Whether a file is the unedited result of an earlier calibration."""
    try:
        first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return first.startswith(HEADER) and first.endswith(f"[{_digest(rest)}]")


def _at_the_top(base: Preset, changes: dict[str, Any]) -> dict[str, Any]:
    """Complete mappings with the base preset's keys: outside of rules a missing key would get its default instead."""
    return {
        key: {**getattr(base, key).model_dump(mode="json"), **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
