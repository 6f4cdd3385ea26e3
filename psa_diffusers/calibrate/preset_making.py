"""From the shape and scale of each layer to a preset."""

from __future__ import annotations

import json
from typing import Any

from psa_diffusers.calibrate.choose import Solution
from psa_diffusers.calibrate.scaling import scaled_settings
from psa_diffusers.calibrate.shapes import SHAPES, shaped
from psa_diffusers.presets import Preset


def make_preset(base: Preset, solution: Solution | None, num_layers: int, name: str, source: str) -> Preset:
    """The base preset with what each layer of a solution is to do; without rules where all do the same.

    Args:
        solution: None leaves the base preset's settings.
    """
    settings = base.model_dump(mode="json", exclude_unset=True) | {"name": name, "source": source}
    if solution is None:
        return Preset(**settings)
    specs = {shape: shaped(base, shape).layer_specs(num_layers) for shape in set(solution.shapes.values())}
    alike: dict[str, list[int]] = {}
    for layer, shape in sorted(solution.shapes.items()):
        changes = {**SHAPES[shape], **scaled_settings(specs[shape][layer], solution.scales[layer])}
        alike.setdefault(json.dumps(changes), []).append(layer)
    if len(alike) == 1 and not base.layers and len(solution.shapes) == num_layers:
        return Preset(**{**settings, **_at_the_top(base, json.loads(next(iter(alike))))})
    rules = [rule.model_dump(mode="json", exclude_unset=True) for rule in base.layers]
    rules += [{"match": ",".join(map(str, layers)), **json.loads(changes)} for changes, layers in alike.items()]
    return Preset(**{**settings, "layers": rules})


def _at_the_top(base: Preset, changes: dict[str, Any]) -> dict[str, Any]:
    """Outside of rules a mapping that leaves out a key would get that key's default, not the base preset's."""
    return {
        key: {**getattr(base, key).model_dump(mode="json"), **value} if isinstance(value, dict) else value
        for key, value in changes.items()
    }
