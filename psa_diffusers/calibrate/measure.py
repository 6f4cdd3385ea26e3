"""What each shape of sparse attention would do in each layer at several scales, seen on the calls of a dense run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from psa_diffusers.calibrate.choose import Curve
from psa_diffusers.calibrate.scaling import SCALES, known_density, scaled_spec
from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.graph_ops import Layer
from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.presets import Preset

LEAST_ERROR = 1e-12  # of what is exact, so that it has a logarithm

# Of each layer and shape one list a scale under `densities` and `errors`, and under `blocks` the number of key blocks.
Figures = dict[str, dict[str, dict[str, list[float]]]]


class MeasuringProcessor(PSAProcessor):
    """Computes everything densely; at some steps it also measures, and never changes the video.

    Args:
        shapes: the presets to compare, by name.
        steps: the denoising steps, counted from 0, at which to measure: sparse ones of the presets.
    """

    def __init__(self, pipe: Any, shapes: Mapping[str, Preset], steps: set[int]) -> None:
        # Lists that are kept for later steps would be those of another shape.
        alone = {name: each.replace(refresh=1, share_guidance=False) for name, each in shapes.items()}
        super().__init__(pipe, next(iter(alone.values())), strict=True)
        self._measured_steps = steps
        self._shaped: dict[str, dict[str, Layer]] = {}
        for which, reference in self._transformers.items():
            prefix = f"{which}." if len(self._transformers) > 1 else ""
            names = [prefix + name for name in self._family.self_attentions(reference())]
            for shape, preset in alone.items():
                rows = zip(names, preset.layer_specs(len(names)), preset.layer_orders(len(names)), strict=True)
                for name, spec, order in rows:
                    self._shaped.setdefault(name, {})[shape] = Layer(name, which, preset, spec, order)
        self._found: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
        self._blocks: dict[tuple[str, str], int] = {}

    def figures(self) -> Figures:
        """Means over the measured calls: of the densities, and of the errors' logarithms."""
        figures: Figures = {}
        for (name, shape), calls in self._found.items():
            densities, errors = torch.stack(calls).double().cpu().unbind(1)
            figures.setdefault(name, {})[shape] = {
                "densities": densities.mean(0).tolist(),
                "errors": errors.clamp_min(LEAST_ERROR).log().mean(0).exp().tolist(),
                "blocks": [self._blocks[name, shape]],
            }
        return figures

    def _attend(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = self._tracker.current
        head, tail = self._attention.dense(q, k, v, call)
        self._recorder.add_dense(at.step, layer.name)
        if at.branch == 0 and at.step in self._measured_steps:
            video = math.prod(at.grid)
            for shape, shaped in self._shaped[layer.name].items():
                self._blocks[layer.name, shape] = -(-video // shaped.spec.block_key)
                measured = [self._measure(shaped, scale, video, q, k, v, call, head) for scale in SCALES]
                self._found[layer.name, shape].append(torch.stack(measured, dim=-1))
        return head, tail

    def _measure(
        self,
        layer: Layer,
        scale: float,
        video: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: AttentionCall,
        dense: torch.Tensor,
    ) -> torch.Tensor:
        """Density, and squared error of the video tokens relative to dense attention."""
        scaled = replace(layer, spec=scaled_spec(layer.spec, scale))
        sparse, _, stats = self._attention.sparse(scaled, self._tracker.current, q, k, v, call)
        reference = dense[:, -video:].float()
        error = (sparse[:, -video:].float() - reference).square().sum() / reference.square().sum().clamp_min(1e-20)
        return torch.stack([torch.stack([figures.density.mean() for figures in stats]).mean(), error])


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
    # More work never counts as a larger error: a rise is noise of the few prompts.
    errors = np.minimum.accumulate(np.exp(np.mean(np.log([row["errors"] for row in rows]), axis=0)))
    densities = np.maximum.accumulate(np.mean([row["densities"] for row in rows], axis=0))
    return Curve(densities.tolist(), errors.tolist(), lambda scale: known_density(scaled_spec(spec, scale), blocks))
