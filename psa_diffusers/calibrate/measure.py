"""Measures on the calls of a dense run what each shape of sparse attention would do in each layer at several scales."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch

from psa_diffusers.calibrate.choose import Curve
from psa_diffusers.calibrate.scaling import SCALES, known_density_at, scaled_spec
from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.attend import QKV, Parts, TokenAttention
from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.patch.run import Forward
from psa_diffusers.patch.sites import Layer
from psa_kernels import AttentionStats
from psa_presets import Preset

MIN_ERROR = 1e-12  # counts as the error of exact attention, so that it has a logarithm

# Of each layer and shape one list a scale under `densities` and `errors`, and under `blocks` the number of key blocks.
Figures = dict[str, dict[str, dict[str, list[float]]]]


class Measurement:
    """Patches a pipeline, computes everything densely, and measures at some steps. It never changes the video.

    Args:
        shapes: the presets to compare, by name.
        steps: the denoising steps, counted from 0, at which to measure: sparse ones of the presets.
    """

    def __init__(self, pipe: Any, shapes: Mapping[str, Preset], steps: set[int]) -> None:
        # Without lists kept for later steps: those would be the lists of another shape.
        alone = {name: each.replace(refresh=1, share_guidance=False, correction=False) for name, each in shapes.items()}
        self.processor = PSAProcessor(pipe, next(iter(alone.values())), strict=True)
        self.processor.compute_with(self._compute)
        self._steps = steps
        self._shaped: dict[str, dict[str, Layer]] = {}
        for layers in self.processor.layers.values():
            for shape, preset in alone.items():
                rows = zip(layers, preset.layer_specs(len(layers)), preset.layer_orders(len(layers)), strict=True)
                for layer, spec, order in rows:
                    shaped = replace(layer, preset=preset, spec=spec, order=order, keeps_lists=False)
                    self._shaped.setdefault(layer.name, {})[shape] = shaped
        self._found: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
        self._blocks: dict[tuple[str, str], int] = {}

    def __enter__(self) -> Self:
        self.processor.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.processor.restore()

    def figures(self) -> Figures:
        """Means over the measured calls: of the densities, and of the errors' logarithms."""
        figures: Figures = {}
        for (name, shape), calls in self._found.items():
            densities, errors = torch.stack(calls).double().cpu().unbind(1)
            figures.setdefault(name, {})[shape] = {
                "densities": densities.mean(0).tolist(),
                "errors": errors.clamp_min(MIN_ERROR).log().mean(0).exp().tolist(),
                "blocks": [self._blocks[name, shape]],
            }
        return figures

    def _compute(
        self, attention: TokenAttention, layer: Layer, forward: Forward, qkv: QKV, call: AttentionCall
    ) -> tuple[Parts, list[AttentionStats]]:
        head, tail = attention.dense(qkv, call)
        if forward.branch == 0 and forward.step in self._steps:
            video = math.prod(forward.attended_grid)
            for shape, shaped in self._shaped[layer.name].items():
                if shaped.spec is None:
                    continue
                self._blocks[layer.name, shape] = -(-video // shaped.spec.block_key)
                scaled = [replace(shaped, spec=scaled_spec(shaped.spec, scale)) for scale in SCALES]
                dense = attention.video_of(head, forward.grid)
                measured = [_measure(attention, each, forward, qkv, call, dense) for each in scaled]
                self._found[layer.name, shape].append(torch.stack(measured, dim=-1))
        return (head, tail), []


def _measure(
    attention: TokenAttention, layer: Layer, forward: Forward, qkv: QKV, call: AttentionCall, dense: torch.Tensor
) -> torch.Tensor:
    """Density, and squared error of the video tokens relative to dense attention."""
    (sparse, _), stats = attention.sparse(layer, forward, qkv, call)
    reference = dense.float()
    error = (attention.video_of(sparse, forward.grid).float() - reference).square().sum()
    density = torch.stack([figures.density.mean() for figures in stats]).mean()
    return torch.stack([density, error / reference.square().sum().clamp_min(1e-20)])


def curves_of(figures: list[Figures], shapes: Mapping[str, Preset], names: list[str]) -> dict[int, dict[str, Curve]]:
    """Of one transformer's layers, by number and shape, what was measured of several videos.

    Args:
        names: of all the transformer's layers. Those that were not measured are left out: dense ones.
    """
    specs = {shape: preset.layer_specs(len(names)) for shape, preset in shapes.items()}
    found: dict[int, dict[str, Curve]] = {}
    for index, name in enumerate(names):
        for shape in shapes:
            rows = [each[name][shape] for each in figures if name in each]
            if rows:
                found.setdefault(index, {})[shape] = _curve(rows, specs[shape][index])
    return found


def _curve(rows: list[dict[str, list[float]]], spec: Any) -> Curve:
    blocks = int(rows[0]["blocks"][0])
    # Errors must not rise with more work: a rise is noise, because there are few prompts.
    errors = np.minimum.accumulate(np.exp(np.mean(np.log([row["errors"] for row in rows]), axis=0)))
    densities = np.maximum.accumulate(np.mean([row["densities"] for row in rows], axis=0))
    return Curve(densities.tolist(), errors.tolist(), lambda scale: known_density_at(spec, scale, blocks))
