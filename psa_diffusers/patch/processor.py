"""PSAProcessor: the attention processor that makes a pipeline's video self-attention sparse."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.diffusers_internals import parallel_config
from psa_diffusers.families import AttentionCall, find_family
from psa_diffusers.patch import graph_ops as compiled
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.context_parallel import Ulysses, share_of
from psa_diffusers.patch.dense_reasons import Fallbacks, PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.finite_guard import REASON, FiniteGuard, all_finite
from psa_diffusers.patch.graph_ops import Layer, Site
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.modules import attention_modules, find_transformers, set_processor
from psa_diffusers.patch.stats import RunRecorder, RunStats
from psa_diffusers.patch.step import DenoisingTracker
from psa_diffusers.patch.unreached import unreached
from psa_diffusers.presets import Preset, load_preset

__all__ = ["PSAFallbackError", "PSAFallbackWarning", "PSAProcessor"]


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
        self._sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        layers: list[str] = []
        self._transformers = {name: weakref.ref(transformer) for name, transformer in transformers.items()}
        for name, transformer in transformers.items():
            prefix = f"{name}." if len(transformers) > 1 else ""
            layers += self._take_over(transformer, name, prefix)
        self._attention = TokenAttention(self._family, strict)
        self._share: Ulysses | None = None
        self._recorder = RunRecorder(layers)
        self._tracker = DenoisingTracker(pipe, self._family.token_grid)
        self._fallbacks = Fallbacks(self.presets, self._tracker, self._recorder, strict)
        forget, refuse = self._attention.forget_step, self._fallbacks.refuse
        self._guard = FiniteGuard(self._tracker, self._recorder, forget, refuse, strict)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for transformer in transformers.values():
            self._tracker.attach(transformer)
            self._hooks.append(transformer.register_forward_pre_hook(self._before_forward))
            watch = {"prepend": True, "with_kwargs": True}
            self._hooks.append(transformer.register_forward_hook(self._guard.after_forward, **watch))

    def install(self) -> None:
        """Set this processor on all attention modules of the pipeline's transformers."""
        for attn in self._sites:
            set_processor(attn, self)

    def stats(self) -> RunStats:
        """What the last run attended; waits for the device."""
        return self._recorder.stats()

    def record_masks(self, recorder: MaskRecorder | None) -> None:
        """From now on, hand the block lists of sparse calls to a recorder; None ends it."""
        self._attention.mask_recorder = recorder

    def restore(self) -> None:
        """Give every module that still has this processor its own one back, and stop watching the pipeline."""
        for attn, site in self._sites.items():
            if attn.processor is self:
                self._hand_on(site)
            compiled.withdraw(attn, site)
            if attn.processor is self:
                set_processor(attn, site.original)
        self._tracker.detach()
        while self._hooks:
            self._hooks.pop().remove()
        self._attention.clear()
        if self._family.text != "none" and any(parallel_config(found()) for found in self._transformers.values()):
            warnings.warn(
                f"{self._family.name} in context parallel is only right with PSAProcessor; do not run it without",
                PSAFallbackWarning,
                stacklevel=2,
            )

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
        compiling = torch.compiler.is_compiling()
        site = compiled.site_of(attn) if compiling else self._sites.get(attn)
        if site is None:
            raise RuntimeError(
                f"PSAProcessor was made for another pipeline and does not know this {type(attn).__name__}; "
                "make one with PSAProcessor(pipe, ...)"
            )
        positions = image_rotary_emb if rotary_emb is None else rotary_emb
        call = AttentionCall(hidden_states, encoder_hidden_states, attention_mask, positions)
        if site.layer is not None:
            # In a graph, and where other ranks have to go the same way, it was decided before the forward.
            decided = compiling or self._share is not None
            if site.ours if decided else self._is_sparse(site, call):
                return self._compute(attn, site, call)
            if compiling:
                compiled.note_dense(site.number)
            elif decided:
                self.note_dense(site.layer, site.reason)
        # Processors differ in which of these they know, so only what was given is passed on, and as it was given.
        positional = () if rotary_emb is None else (rotary_emb,)
        named = {"temb": temb, "image_rotary_emb": image_rotary_emb}
        named = {name: value for name, value in named.items() if value is not None}
        return site.original(attn, hidden_states, encoder_hidden_states, attention_mask, *positional, **named)

    def _take_over(self, transformer: torch.nn.Module, which: str, prefix: str) -> list[str]:
        """Note all attention modules of a transformer and their processors; return the names of its layers."""
        preset = self.presets[which]
        attentions = self._family.self_attentions(transformer)
        specs, orders = preset.layer_specs(len(attentions)), preset.layer_orders(len(attentions))
        layers = {
            attn: Layer(prefix + name, which, preset, spec, order)
            for (name, attn), spec, order in zip(attentions.items(), specs, orders, strict=True)
        }
        for attn in attention_modules(transformer):
            original = attn.processor
            if isinstance(original, PSAProcessor):
                original = original._sites[attn].original
            self._sites[attn] = Site(self, original, which, layers.get(attn))
        return [layer.name for layer in layers.values()]

    @torch.compiler.disable
    def _before_forward(self, transformer: torch.nn.Module, _: tuple) -> None:
        """Decide for each layer what is known before the forward, for compiled blocks cannot ask inside it."""
        at = self._tracker.current
        grid = None if at is None else at.grid
        self._share, obstacle = share_of(transformer, self._family, grid)
        always_ours = not self._family.stock_traceable or (self._share is not None and self._family.text != "none")
        (which,) = (name for name, found in self._transformers.items() if found() is transformer)
        for attn, site in self._sites.items():
            if attn.processor is self:
                compiled.publish(attn, site)
                self._hand_on(site)
            if site.layer is not None and site.transformer == which:
                site.sparse, site.reason = self._fallbacks.foresee(site.layer, obstacle)
                site.ours = site.sparse or always_ours
        for layers, reason in unreached(self._sites.items(), which, PSAProcessor):
            self._fallbacks.note_unreached(layers, reason)
        self._guard.before_forward(transformer, shared=parallel_config(transformer) is not None)

    def _hand_on(self, site: Site) -> None:
        """Give the module's own processor what diffusers has since set on this one, or on the transformer."""
        config = parallel_config(self._transformers[site.transformer]())
        if config is not None and site.layer is None and self._family.replicates_text:
            config = None
            if vars(site.original).get("_parallel_config", self) is not None:
                # A copy, made once: self-attention may have the same object, and does share its heads.
                site.original = copy.copy(site.original)
                site.original._parallel_config = None
        for name, value in (("_attention_backend", self._attention_backend), ("_parallel_config", config)):
            if value is not None and hasattr(site.original, name):
                setattr(site.original, name, value)

    def _is_sparse(self, site: Site, call: AttentionCall) -> bool:
        """Decide about one call of a layer, and note it if it is dense."""
        reason = self._attention.obstacle(self._tracker.current, call) if site.sparse else site.reason
        sparse = site.sparse and reason is None
        if not sparse:
            self.note_dense(site.layer, reason)
        return sparse

    def note_dense(self, layer: Layer, reason: str | None) -> None:
        """Note a dense call of a layer, and why it is dense if the preset wants it sparse."""
        self._fallbacks.note(layer, reason)

    def _compute(
        self, attn: torch.nn.Module, site: Site, call: AttentionCall
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self._family.project(attn, call)
        text = call.text_tokens
        if torch.compiler.is_compiling():
            text_last = self._family.text == "after"
            head, tail = compiled.attend(q, k, v, call.attention_mask, site.number, text, text_last)
        elif self._share is not None:
            head, tail = self.attend_behind_graph(site, q, k, v, call.attention_mask, text)
        else:
            head, tail = self._attend(site.layer, q, k, v, call)
        if self._family.text == "before":
            return self._family.output(attn, head[:, text:], head[:, :text])
        return self._family.output(attn, head, tail if text else None)

    def _attend(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = self._tracker.current
        head, tail, stats = self._attention.sparse(layer, at, q, k, v, call)
        if self._guard.looks_closer and not all_finite(head, tail):
            return self._attend_again(layer, q, k, v, call)
        for figures in stats:
            self._recorder.add_sparse(at.step, layer.name, figures)
        return head, tail

    def _attend_again(
        self, layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention in place of sparse attention that was not finite."""
        at = self._tracker.current
        self._attention.forget_step(at)
        head, tail = self._attention.dense(q, k, v, call)
        if all_finite(head, tail):
            self._guard.blame_sparse(layer.name, at)
        else:
            self._guard.blame_model(layer.name, at)
        self._recorder.add_dense(at.step, layer.name, REASON)
        return head, tail

    def attend_behind_graph(
        self,
        site: Site,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of a block that is compiled, or shared among ranks, after its projections; perhaps dense."""
        before, after = (text, 0) if self._family.text == "before" else (0, text)
        share = self._share
        if share is not None:
            q, k, v = share.gather_tokens((q, k, v), before, after)
        # Of the hidden states that the block had, only the number of tokens matters.
        call = AttentionCall(q[:, text:], q[:, :text] if text else None, attention_mask)
        if self._is_sparse(site, call):
            head, tail = self._attend(site.layer, q, k, v, call)
        else:
            head, tail = self._attention.dense(q, k, v, call)
        return (head, tail) if share is None else share.gather_heads(head, tail, before)
