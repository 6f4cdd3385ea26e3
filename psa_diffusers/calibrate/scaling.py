"""One dial for how much a layer attends: its preset's thresholds, all multiplied by one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from psa_diffusers.presets import Preset
from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.allocation.reference import allocate

# From a fifth of what the base preset attends to most of everything.
SCALES = (0.2, 0.33, 0.57, 1.0, 1.7, 3.0)
BASE = SCALES.index(1.0)
DENSE = None  # stands for a scale where a layer is better left dense
LEAST = 1e-4


def scaled_spec(spec: AttentionSpec, scale: float) -> AttentionSpec:
    """A layer's parameters with thresholds and floor multiplied by a scale, at most 1."""
    return replace(spec, thresholds=_scaled(spec.thresholds, scale), floor=min(1.0, round(spec.floor * scale, 4)))


@lru_cache(maxsize=4096)
def known_density(spec: AttentionSpec, key_blocks: int) -> float | None:
    """The density of every call with that many key blocks; None where it depends on the video."""
    if spec.rule != "count" or spec.similarity is not None:
        return None
    ranked = torch.arange(key_blocks, 0, -1, dtype=torch.float32)[None, None, None]
    return AttentionStats.from_lists(allocate(ranked, None, spec), spec, "").density.item()


def scaled_preset(base: Preset, scales: Mapping[int, float | None], num_layers: int, name: str, source: str) -> Preset:
    """The base preset with a further rule for each layer in `scales` (its number and its scale, or DENSE)."""
    specs = base.layer_specs(num_layers)
    alike: dict[tuple, list[int]] = {}
    for layer, scale in sorted(scales.items()):
        if scale is DENSE:
            key: tuple = ("dense",)
        else:
            spec = scaled_spec(specs[layer], scale)
            key = (spec.thresholds, spec.floor)
        alike.setdefault(key, []).append(layer)
    rules: list[dict[str, Any]] = [rule.model_dump(mode="json", exclude_unset=True) for rule in base.layers]
    for key, layers in alike.items():
        match = ",".join(map(str, layers))
        if key == ("dense",):
            rules.append({"match": match, "dense": True})
        else:
            floor = {"floor": key[1]} if key[1] else {}
            rules.append({"match": match, "thresholds": list(key[0]), **floor})
    settings = base.model_dump(mode="json", exclude_unset=True)
    return Preset(**{**settings, "name": name, "source": source, "layers": rules})


def _scaled(thresholds: tuple[float, ...], scale: float) -> tuple[float, ...]:
    *finer, last = (min(1.0, round(threshold * scale, 4)) for threshold in thresholds)
    return (*finer, max(last, LEAST))
