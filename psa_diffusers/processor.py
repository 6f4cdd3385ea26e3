"""PSAProcessor: the attention processor that makes a pipeline's video self-attention sparse."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.denoising import DenoisingStep, DenoisingTracker, Grid
from psa_diffusers.list_cache import ListCache
from psa_diffusers.models import UnsupportedModelError, find_family
from psa_diffusers.presets import Preset, load_preset
from psa_diffusers.statistics import RunRecorder, RunStats
from psa_diffusers.token_order import token_permutation
from psa_kernels import AttentionSpec, psa_attention, select_blocks

TRANSFORMERS = ("transformer", "transformer_2")
KEPT_PERMUTATIONS = 4


class PSAFallbackWarning(UserWarning):
    """Calls run dense although the preset asked for sparse attention."""


class PSAFallbackError(RuntimeError):
    """With `strict=True`: a call would have run dense although the preset asked for sparse attention."""


@dataclass(frozen=True)
class _Layer:
    """One video self-attention; `spec` is None where the preset keeps it dense."""

    name: str
    transformer: str
    preset: Preset
    spec: AttentionSpec | None


@dataclass(frozen=True)
class _Module:
    """An attention module of the pipeline: the processor it had, and the layer it is, if it is one."""

    original: Any
    layer: _Layer | None


class PSAProcessor:
    """Sparse video self-attention for a diffusers pipeline, set with `pipe.transformer.set_attn_processor(...)`.

    One object serves all attention modules of `transformer` and `transformer_2`. Cross-attention, the preset's dense
    phase and whatever cannot be sparse go to the processors that the modules had before, unchanged.

    Example:
        >>> pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset="psa-3"))

    Args:
        pipe: a diffusers pipeline of a supported model; it is not kept alive.
        preset: name of a shipped preset, path of a YAML file, or a `Preset`.
        preset_2: the same for `transformer_2` of pipelines with two experts; by default `preset`.
        strict: raise instead of falling back to dense attention.

    Raises:
        UnsupportedModelError: the pipeline's transformer is of no supported family.
        PresetError: a preset cannot be read, or names layers that the transformer lacks.
        ValueError: `preset_2` is given, but the pipeline has one transformer.
    """

    # Written by diffusers' set_attention_backend and enable_parallelism, where a processor has them.
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self,
        pipe: Any,
        preset: str | Path | Preset = "psa-3",
        *,
        preset_2: str | Path | Preset | None = None,
        strict: bool = False,
    ) -> None:
        self.strict = strict
        transformers = find_transformers(pipe)
        if preset_2 is not None and "transformer_2" not in transformers:
            raise ValueError(f"preset_2={preset_2!r}: {type(pipe).__name__} has no second transformer here")
        self.presets = {name: load_preset(preset) for name in transformers}
        if preset_2 is not None:
            self.presets["transformer_2"] = load_preset(preset_2)
        self._family = find_family(next(iter(transformers.values())))
        self._modules: weakref.WeakKeyDictionary[torch.nn.Module, _Module] = weakref.WeakKeyDictionary()
        layers: list[str] = []
        for name, transformer in transformers.items():
            prefix = f"{name}." if len(transformers) > 1 else ""
            layers += self._take_over(transformer, name, prefix)
        self._dense_steps: dict[str, int] = {}
        self._permutations: dict[Hashable, torch.Tensor] = {}
        self._warned: set[str] = set()
        self._cache = ListCache()
        self._recorder = RunRecorder(layers)
        self._tracker = DenoisingTracker(pipe, self._family.token_grid)
        for transformer in transformers.values():
            self._tracker.attach(transformer)

    def stats(self) -> RunStats:
        """What the last run attended; waits for the device."""
        return self._recorder.stats()

    def restore(self) -> None:
        """Give every module that still has this processor its own one back, and stop watching the pipeline."""
        for attn, module in self._modules.items():
            if attn.processor is self:
                attn.set_processor(module.original)
        self._tracker.detach()
        self._cache.clear()

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The attention of one module; arguments and result are those of the diffusers processors."""
        module = self._modules.get(attn)
        if module is None:
            raise RuntimeError(
                f"PSAProcessor was made for another pipeline and does not know this {type(attn).__name__}; "
                "make one with PSAProcessor(pipe, ...)"
            )
        if module.layer is not None and self._is_sparse(module.layer, hidden_states, attention_mask):
            return self._sparse(attn, module.layer, hidden_states, rotary_emb)
        return self._original(module)(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def _take_over(self, transformer: torch.nn.Module, which: str, prefix: str) -> list[str]:
        """Note all attention modules of a transformer and their processors; return the names of its layers."""
        preset = self.presets[which]
        attentions = self._family.self_attentions(transformer)
        specs = preset.layer_specs(len(attentions))
        layers = {
            attn: _Layer(prefix + name, which, preset, spec)
            for (name, attn), spec in zip(attentions.items(), specs, strict=True)
        }
        for attn in transformer.modules():
            if not hasattr(attn, "set_processor"):
                continue
            original = attn.processor
            if isinstance(original, PSAProcessor):
                original = original._modules[attn].original
            self._modules[attn] = _Module(original, layers.get(attn))
        return [layer.name for layer in layers.values()]

    def _is_sparse(self, layer: _Layer, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Decide about one call of a layer, and note it if it is dense."""
        at = self._tracker.current
        if at is None:
            self._refuse("the denoising step is unknown, because the pipeline's scheduler has no timesteps")
            return False
        if at.run != self._recorder.run:
            self._dense_steps = {name: preset.dense_step_count(at.steps) for name, preset in self.presets.items()}
            self._recorder.start(at.run, at.steps, min(self._dense_steps.values()))
        if layer.spec is None or at.step < self._dense_steps[layer.transformer]:
            self._recorder.add_dense(at.step, layer.name)
            return False
        reason = self._obstacle(layer.preset, at, hidden_states, attention_mask)
        if reason is not None:
            self._recorder.add_dense(at.step, layer.name, reason)
            self._refuse(reason)
        return reason is None

    def _obstacle(
        self, preset: Preset, at: DenoisingStep, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> str | None:
        """Why a call that the preset wants sparse cannot be."""
        tokens = hidden_states.shape[1]
        frames, height, width = at.grid
        if self._parallel_config is not None:
            return "context parallelism is enabled, which sparse attention does not support yet"
        if tokens != frames * height * width:
            return f"the sequence has {tokens} tokens, but the video's grid is {frames} x {height} x {width}"
        if tokens < preset.min_tokens:
            return f"the sequence of {tokens} tokens is shorter than min_tokens={preset.min_tokens}"
        if attention_mask is not None:
            return "the layer was given an attention mask"
        if torch.is_grad_enabled():
            return "gradients are enabled, and sparse attention is for inference only"
        return None

    def _refuse(self, reason: str) -> None:
        if self.strict:
            raise PSAFallbackError(f"strict: attention would be dense: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"attention is dense: {reason}", PSAFallbackWarning, stacklevel=4)

    def _sparse(
        self,
        attn: torch.nn.Module,
        layer: _Layer,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        at = self._tracker.current
        q, k, v = self._family.project(attn, hidden_states, rotary_emb)
        permutation = self._permutation(layer.preset, at.grid, q.device)
        call = (q.shape, q.device, at.grid)
        lists = self._cache.find(layer.name, at, call, layer.preset)
        if lists is None:
            lists = select_blocks(q, k, layer.spec, permutation=permutation)
            self._cache.keep(layer.name, at, call, layer.preset, lists)
        attended, stats = psa_attention(q, k, v, layer.spec, permutation=permutation, lists=lists, return_stats=True)
        self._recorder.add_sparse(at.step, layer.name, stats)
        return self._family.output(attn, attended)

    def _permutation(self, preset: Preset, grid: Grid, device: torch.device) -> torch.Tensor | None:
        """The preset's token order on a device; only the last few are kept."""
        if preset.order == "raster":
            return None
        key = (preset.order, preset.tile, grid, device)
        if key not in self._permutations:
            if len(self._permutations) == KEPT_PERMUTATIONS:
                self._permutations.clear()
            self._permutations[key] = token_permutation(preset.order, grid, preset.tile).to(device)
        return self._permutations[key]

    def _original(self, module: _Module) -> Any:
        """The processor that a module had, told what diffusers has since set on this one."""
        for name in ("_attention_backend", "_parallel_config"):
            value = getattr(self, name)
            if value is not None and hasattr(module.original, name):
                setattr(module.original, name, value)
        return module.original


def find_transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by attribute name.

    Raises:
        UnsupportedModelError: it has none.
    """
    found = {name: module for name in TRANSFORMERS if (module := getattr(pipe, name, None)) is not None}
    if not found:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer: it is no supported diffusers pipeline")
    return found
