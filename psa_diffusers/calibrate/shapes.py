"""Shapes of attention to try instead of the base preset's: other orders, blocks and rules, at equal density."""

from __future__ import annotations

from typing import Any

from psa_presets import Preset, PresetError
from psa_presets.keys import LayerKeys

BASE = "as the base preset"
# Changes to the base preset, as a rule for layers says them. The rule `budget` and other splits over the levels are no
# candidates: errors of single calls favour pooling, more than whole videos do.
SHAPES: dict[str, LayerKeys] = {
    BASE: {},
    "raster": {"order": "raster"},
    "hilbert": {"order": "hilbert"},
    "tiles": {"order": "tiles", "tile": [4, 4, 4]},
    "flat tiles": {"order": "tiles", "tile": [1, 4, 16]},
    "32 keys": {"block": {"key": 32}},
    "raster, 32 keys": {"order": "raster", "block": {"key": 32}},
    "hilbert, 32 keys": {"order": "hilbert", "block": {"key": 32}},
    "raster, 128 keys": {"order": "raster", "block": {"key": 128}},
    "tiles, 32 keys": {"order": "tiles", "tile": [4, 4, 4], "block": {"key": 32}},
    "raster, 32 keys, mass with a floor": {
        "order": "raster",
        "block": {"key": 32},
        "levels": [1, 2, 4],
        "rule": "mass",
        "thresholds": [0.4, 0.6, 0.9],
        "floor": 0.15,
    },
}
MIN_ROWS = 8  # of a key block at its coarsest level: fewer leave the tiles of the kernels half empty


def shaped(base: Preset, shape: str) -> Preset:
    """The base preset with a shape in all layers that it makes sparse.

    Raises:
        PresetError: a setting of the base preset does not fit the shape.
    """
    return base.replace(layers=[*base.layers, {"match": "0-", **SHAPES[shape]}]) if SHAPES[shape] else base


def shapes_for(base: Preset, num_layers: int) -> dict[str, Preset]:
    """The shapes that fit a base preset and a kernel's tiles, by name, without duplicates; the base's own is first."""
    found: dict[str, Preset] = {}
    seen: set[tuple] = set()
    for name in SHAPES:
        try:
            preset = shaped(base, name)
            layers = (preset.layer_specs(num_layers), _orders(preset, num_layers))
        except PresetError:
            continue
        if layers in seen or ("block" in SHAPES[name] and any(_narrow(spec) for spec in layers[0])):
            continue
        seen.add(layers)
        found[name] = preset
    return found


def _orders(preset: Preset, num_layers: int) -> tuple:
    """The layers' orders; of tiles alone the size counts."""
    return tuple((each.order, each.tile * (each.order == "tiles")) for each in preset.layer_orders(num_layers))


def _narrow(spec: Any) -> bool:
    return spec is not None and spec.block_key // max(spec.levels) < MIN_ROWS
