"""Scales how much a layer attends: one number multiplies its thresholds, or its budget."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.allocation.reference import allocate
from psa_presets.density import scaled_thresholds

# Scales at which errors are measured. With a base preset of density 0.25 they reach from a fifth of that to nearly 1.
SCALES = (0.2, 0.5, 1.25, 3.0)
LEAST = 1e-4


def scaled_spec(spec: AttentionSpec, scale: float) -> AttentionSpec:
    """A layer's parameters with thresholds and floor, or density, multiplied by a scale, at most 1."""
    settings = scaled_settings(spec, scale)
    return replace(spec, **{**settings, "thresholds": tuple(settings.get("thresholds", spec.thresholds))})


def scaled_settings(spec: AttentionSpec, scale: float) -> dict[str, Any]:
    """The scaled keys of a layer, as a preset has them."""
    if spec.density is not None:
        # The mean tokens of `rest: mean` are paid in any case.
        least = 1 / spec.block_key if spec.rest == "mean" else LEAST
        return {"density": min(1.0, max(round(spec.density * scale, 4), least))}
    *finer, last, floor = scaled_thresholds([*spec.thresholds, spec.floor], scale, digits=4)
    return {"thresholds": [*finer, max(last, LEAST)], **({"floor": floor} if spec.floor else {})}


@lru_cache(maxsize=16384)
def known_density(spec: AttentionSpec, key_blocks: int) -> float | None:
    """The density of every call with that many key blocks; None where it depends on the video."""
    if spec.rule != "count" or spec.similarity is not None:
        return None
    ranked = torch.arange(key_blocks, 0, -1, dtype=torch.float32)[None, None, None]
    return AttentionStats.from_lists(allocate(ranked, None, spec), spec, "").density.item()


@lru_cache(maxsize=65536)
def known_density_at(spec: AttentionSpec, scale: float, key_blocks: int) -> float | None:
    """`known_density` at a scale. A search asks for the same scales over and over, of layers that are mostly alike."""
    return known_density(scaled_spec(spec, scale), key_blocks)
