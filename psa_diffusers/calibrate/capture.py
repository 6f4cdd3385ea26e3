"""What sparse attention of several densities would do in each layer, measured on the tensors of a dense run.

Two figures a layer: the relative error of its attention output at each scale, cheap, and at a few scales what sparse
attention in this layer alone changes in the transformer's output, for one more forward each. Their ratio carries the
first over to the output: a large error in a layer that hardly matters is no reason to spend work there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from psa_diffusers.calibrate.scaling import BASE, SCALES, scaled_spec
from psa_diffusers.compiled import Layer
from psa_diffusers.denoising import DenoisingStep
from psa_diffusers.models import AttentionCall
from psa_diffusers.presets import Preset
from psa_diffusers.processor import PSAProcessor

Figures = dict[str, dict[str, list[float]]]
# Scales, by their place among SCALES, at which one layer alone is made sparse: a forward each.
PROBED = (0, 2, BASE)


class MeasuringProcessor(PSAProcessor):
    """Computes everything densely; at some steps it also measures, and never changes the video.

    Args:
        base: the preset whose thresholds are scaled.
        steps: the denoising steps, counted from 0, at which to measure: sparse ones of the base preset.
    """

    def __init__(self, pipe: Any, base: Preset, steps: set[int]) -> None:
        # Lists that are kept for later steps would be those of another scale.
        super().__init__(pipe, base.model_copy(update={"refresh": 1, "share_guidance": False}), strict=True)
        self._measured_steps = steps
        self._probed: Layer | None = None
        self._errors: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._densities: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._effects: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._blocks: dict[str, int] = {}
        for reference in self._transformers.values():
            self._hooks.append(reference().register_forward_hook(self._probe, with_kwargs=True))

    def figures(self) -> Figures:
        """Of each layer the means over its measured calls: `errors` and `densities`, one a scale, `effect`, `blocks`.

        `effect` is the squared error of the transformer's output with this layer alone sparse, at the scales `PROBED`,
        and `errors` are those of its attention, carried over to the output (`_carried_over`). `blocks` is its number of
        key blocks.
        """
        figures = {}
        for name, each in self._errors.items():
            errors, effects = (torch.stack(calls).double().cpu().numpy() for calls in (each, self._effects[name]))
            figures[name] = {
                "errors": np.mean(
                    [_carried_over(*call) for call in zip(errors, effects, strict=True)], axis=0
                ).tolist(),
                "densities": torch.stack(self._densities[name]).double().mean(0).tolist(),
                "effect": effects.mean(0).tolist(),
                "blocks": [self._blocks[name]],
            }
        return figures

    def _attend(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = self._tracker.current
        if self._probed is not None and layer.name == self._probed.name:
            return super()._attend(self._probed, q, k, v, call)
        head, tail = self._attention.dense(q, k, v, call)
        self._recorder.add_dense(at.step, layer.name)
        if self._probed is None and self._measured(at):
            self._measure(layer, at, q, k, v, call, head)
        return head, tail

    def _measured(self, at: DenoisingStep) -> bool:
        return at.branch == 0 and at.step in self._measured_steps

    def _measure(
        self,
        layer: Layer,
        at: DenoisingStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: AttentionCall,
        dense: torch.Tensor,
    ) -> None:
        video = math.prod(at.grid)
        self._blocks[layer.name] = -(-video // layer.spec.block_key)
        errors, densities = [], []
        for scale in SCALES:
            scaled = replace(layer, spec=scaled_spec(layer.spec, scale))
            sparse, _, stats = self._attention.sparse(scaled, at, q, k, v, call)
            errors.append(_squared_error(sparse[:, -video:], dense[:, -video:]))
            densities.append(torch.stack([figures.density.mean() for figures in stats]).mean())
        self._errors[layer.name].append(torch.stack(errors))
        self._densities[layer.name].append(torch.stack(densities))

    def _probe(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After a dense forward, the same again for each layer with that one sparse, at the scales `PROBED`."""
        at = self._tracker.current
        if at is None or not self._measured(at):
            return
        for site in self._sites.values():
            layer = site.layer
            if layer is None or layer.name not in self._errors:
                continue
            if self._transformers[layer.transformer]() is not transformer:
                continue
            effects = []
            for index in PROBED:
                self._probed = replace(layer, spec=scaled_spec(layer.spec, SCALES[index]))
                try:
                    changed = transformer.forward(*args, **kwargs)
                finally:
                    self._probed = None
                effects.append(_squared_error(_tensor(changed), _tensor(output)))
            self._effects[layer.name].append(torch.stack(effects))


def _carried_over(errors: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """From the attention's errors at all scales to those of the output, by their ratio at the scales `PROBED`.

    In between the logarithm of the ratio is on straight lines. It is no constant: what a layer loses first may be what
    the model can do without, and its last blocks what it cannot.
    """
    probed = np.array(PROBED)
    ratios = np.log(np.maximum(effects, 1e-20) / np.maximum(errors[probed], 1e-20))
    return errors * np.exp(np.interp(np.arange(len(errors)), probed, ratios))


def curves_of(figures: list[Figures]) -> dict[str, tuple[list[float], list[float]]]:
    """Densities and errors by layer, means over several videos."""
    merged: dict[str, tuple[list[float], list[float]]] = {}
    for name in {name: None for each in figures for name in each}:
        rows = [each[name] for each in figures if name in each]
        densities = np.mean([row["densities"] for row in rows], axis=0)
        # More work never counts as a larger error: a rise is noise of the few prompts.
        errors = np.minimum.accumulate(np.mean([row["errors"] for row in rows], axis=0))
        merged[name] = (densities.tolist(), errors.tolist())
    return merged


def _squared_error(other: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    reference = reference.float()
    return (other.float() - reference).square().sum() / reference.square().sum().clamp_min(1e-20)


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample
