"""PSAProcessor: the attention processor that makes a pipeline's video self-attention sparse."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.attention_modules import attention_modules, find_transformers, set_processor
from psa_diffusers.denoising import DenoisingStep, DenoisingTracker, Grid
from psa_diffusers.list_cache import ListCache
from psa_diffusers.models import AttentionCall, DenseOnlyError, find_family
from psa_diffusers.presets import Preset, load_preset
from psa_diffusers.statistics import RunRecorder, RunStats
from psa_diffusers.text_padding import TextLengths, attend
from psa_diffusers.token_order import token_permutation
from psa_kernels import AttentionSpec, select_blocks

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
    phase and whatever cannot be sparse go to the processors that the modules had before, unchanged. Text tokens of
    joint attention are attended exactly, padding is not attended. Models without `set_attn_processor` (Mochi, Allegro,
    HunyuanVideo Framepack) are patched by `apply_psa`.

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
        self._transformers = {name: weakref.ref(transformer) for name, transformer in transformers.items()}
        for name, transformer in transformers.items():
            prefix = f"{name}." if len(transformers) > 1 else ""
            layers += self._take_over(transformer, name, prefix)
        self._dense_steps: dict[str, int] = {}
        self._permutations: dict[Hashable, torch.Tensor] = {}
        self._warned: set[str] = set()
        self._cache = ListCache()
        self._text_lengths = TextLengths()
        self._recorder = RunRecorder(layers)
        self._tracker = DenoisingTracker(pipe, self._family.token_grid)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for transformer in transformers.values():
            self._tracker.attach(transformer)
            self._hooks.append(transformer.register_forward_pre_hook(self._look_for_replaced))

    def install(self) -> None:
        """Set this processor on all attention modules of the pipeline's transformers."""
        for attn in self._modules:
            set_processor(attn, self)

    def stats(self) -> RunStats:
        """What the last run attended; waits for the device."""
        return self._recorder.stats()

    def restore(self) -> None:
        """Give every module that still has this processor its own one back, and stop watching the pipeline."""
        for attn, module in self._modules.items():
            if attn.processor is self:
                set_processor(attn, module.original)
        self._tracker.detach()
        while self._hooks:
            self._hooks.pop().remove()
        self._cache.clear()

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        temb: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """The attention of one module; arguments and result are those of the diffusers processors.

        All arguments have names, because diffusers passes on only those that it finds in the signature. Some models
        give their rotary positions as the fifth argument, others by the name `image_rotary_emb`.
        """
        module = self._modules.get(attn)
        if module is None:
            raise RuntimeError(
                f"PSAProcessor was made for another pipeline and does not know this {type(attn).__name__}; "
                "make one with PSAProcessor(pipe, ...)"
            )
        positions = image_rotary_emb if rotary_emb is None else rotary_emb
        call = AttentionCall(hidden_states, encoder_hidden_states, attention_mask, positions)
        if module.layer is not None and self._is_sparse(module.layer, call):
            return self._sparse(attn, module.layer, call)
        # Processors differ in which of these they know, so only what was given is passed on, and as it was given.
        positional = () if rotary_emb is None else (rotary_emb,)
        named = {"temb": temb, "image_rotary_emb": image_rotary_emb}
        named = {name: value for name, value in named.items() if value is not None}
        original = self._original(module)
        return original(attn, hidden_states, encoder_hidden_states, attention_mask, *positional, **named)

    def _take_over(self, transformer: torch.nn.Module, which: str, prefix: str) -> list[str]:
        """Note all attention modules of a transformer and their processors; return the names of its layers."""
        preset = self.presets[which]
        attentions = self._family.self_attentions(transformer)
        specs = preset.layer_specs(len(attentions))
        layers = {
            attn: _Layer(prefix + name, which, preset, spec)
            for (name, attn), spec in zip(attentions.items(), specs, strict=True)
        }
        for attn in attention_modules(transformer):
            original = attn.processor
            if isinstance(original, PSAProcessor):
                original = original._modules[attn].original
            self._modules[attn] = _Module(original, layers.get(attn))
        return [layer.name for layer in layers.values()]

    def _look_for_replaced(self, transformer: torch.nn.Module, _: tuple) -> None:
        """Notice processors that something else has set since, as CogVideoX's `fuse_qkv_projections` does."""
        at = self._tracker.current
        for attn, module in self._modules.items():
            layer, processor = module.layer, attn.processor
            if layer is None or self._transformers[layer.transformer]() is not transformer:
                continue
            if isinstance(processor, PSAProcessor) or processor is module.original:
                continue
            reason = (
                f"another processor, {type(processor).__name__}, replaced PSAProcessor; patch again after such a change"
            )
            if at is not None:
                self._begin_run(at)
                self._recorder.add_dense(at.step, layer.name, reason if self._wants_sparse(layer, at) else None)
            self._refuse(reason)

    def _begin_run(self, at: DenoisingStep) -> None:
        """Forget the last run, if this step is of another one."""
        if at.run != self._recorder.run:
            self._dense_steps = {name: preset.dense_step_count(at.steps) for name, preset in self.presets.items()}
            self._recorder.start(at.run, at.steps, min(self._dense_steps.values()))

    def _wants_sparse(self, layer: _Layer, at: DenoisingStep) -> bool:
        """Whether the preset wants this layer sparse at this step."""
        return layer.spec is not None and at.step >= self._dense_steps[layer.transformer]

    def _is_sparse(self, layer: _Layer, call: AttentionCall) -> bool:
        """Decide about one call of a layer, and note it if it is dense."""
        at = self._tracker.current
        if at is None:
            self._refuse("the denoising step is unknown, because the pipeline's scheduler has no timesteps")
            return False
        self._begin_run(at)
        if not self._wants_sparse(layer, at):
            self._recorder.add_dense(at.step, layer.name)
            return False
        reason = self._obstacle(layer.preset, at, call)
        if reason is not None:
            self._recorder.add_dense(at.step, layer.name, reason)
            self._refuse(reason)
        return reason is None

    def _obstacle(self, preset: Preset, at: DenoisingStep, call: AttentionCall) -> str | None:
        """Why a call that the preset wants sparse cannot be."""
        if self._parallel_config is not None:
            return "context parallelism is enabled, which sparse attention does not support yet"
        if at.grid is None:
            return "this pipeline does not tell the transformer the video's frames, height and width"
        tokens, video = call.hidden_states.shape[1], math.prod(at.grid)
        if tokens < video or (tokens > video and not self._family.history):
            frames, height, width = at.grid
            return f"the sequence has {tokens} tokens, but the video's grid is {frames} x {height} x {width}"
        if video < preset.min_tokens:
            return f"the sequence of {video} tokens is shorter than min_tokens={preset.min_tokens}"
        if torch.is_grad_enabled():
            return "gradients are enabled, and sparse attention is for inference only"
        try:
            self._real_text(call)
        except DenseOnlyError as error:
            return str(error)
        return None

    def _real_text(self, call: AttentionCall) -> list[int]:
        """How many text tokens of each sample are no padding."""
        mask = self._family.text_mask(call)
        if mask is None:
            return [call.text_tokens] * len(call.hidden_states)
        return self._text_lengths.of(call.attention_mask, mask)

    def _refuse(self, reason: str) -> None:
        if self.strict:
            raise PSAFallbackError(f"strict: attention would be dense: {reason}")
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"attention is dense: {reason}", PSAFallbackWarning, stacklevel=4)

    def _sparse(
        self, attn: torch.nn.Module, layer: _Layer, call: AttentionCall
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        at = self._tracker.current
        q, k, v = self._family.project(attn, call)
        text = call.text_tokens
        after = text if self._family.text == "after" else 0
        before = q.shape[1] - math.prod(at.grid) - after
        permutation = self._permutation(layer.preset, at.grid, q.device)
        fits = (q.shape[0], q.shape[2:], q.device, at.grid)
        lists = self._cache.find(layer.name, at, fits, layer.preset)
        if lists is None:
            lists = select_blocks(q, k, layer.spec, text_before=before, text_after=after, permutation=permutation)
            self._cache.keep(layer.name, at, fits, layer.preset, lists)
        lengths = self._real_text(call) if after else [0] * len(q)
        head, tail, stats = attend(
            q, k, v, layer.spec, lists, before=before, after=after, lengths=lengths, permutation=permutation
        )
        for figures in stats:
            self._recorder.add_sparse(at.step, layer.name, figures)
        if self._family.text == "before":
            return self._family.output(attn, head[:, text:], head[:, :text])
        return self._family.output(attn, head, tail if text else None)

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
