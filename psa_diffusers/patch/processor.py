"""PSAProcessor: the attention processor that makes a pipeline's video self-attention sparse."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.diffusers_internals import let_guiders_find, parallel_config
from psa_diffusers.families import find_family
from psa_diffusers.patch.arguments import with_names
from psa_diffusers.patch.attend import Compute, TokenAttention
from psa_diffusers.patch.copies import CopiedProcessor, copied_processor, own_processor
from psa_diffusers.patch.dense_reasons import Fallbacks, PSAFallbackError, PSAFallbackWarning, tell_left_out
from psa_diffusers.patch.hooks import Patch
from psa_diffusers.patch.layer_calls import RIVALS, LayerCalls, Output
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.modules import OF_OTHER_WORKFLOWS, attention_modules, find_transformers, set_processor
from psa_diffusers.patch.replaced import Replaced
from psa_diffusers.patch.runs import Runs
from psa_diffusers.patch.sites import LayerSite, PatchingProcessor, Site, site_of
from psa_diffusers.patch.stats import RunStats
from psa_diffusers.patch.step_layers import StepLayers
from psa_diffusers.patch.telling import Told
from psa_diffusers.patch.waiting import Waiting
from psa_presets import Preset, choose_preset

__all__ = ["PSAFallbackError", "PSAFallbackWarning", "PSAProcessor"]

ELSEWHERE = (
    "PSAProcessor was made for another pipeline and does not know this {kind}; set the model's own processor, or load "
    "the model again, and then make one with PSAProcessor(pipe, ...)"
)


class PSAProcessor(PatchingProcessor, Told):
    """Sparse video self-attention for a diffusers pipeline, set with `pipe.transformer.set_attn_processor(...)`.

    One object serves all attention modules of `transformer`, `transformer_2` and `transformer_ref`. Cross-attention,
    the preset's dense phase and whatever cannot be sparse go to the processors that the modules had before, unchanged.
    Text tokens of joint attention are attended exactly, and padding is not attended. Models without
    `set_attn_processor` (Allegro, AnyFlow, Cosmos, EasyAnimate, HunyuanVideo Framepack, Mochi) are patched by
    `apply_psa`.

    Creating one changes no result: hooks on the transformers wait for it to be set, as long as it exists. It takes
    effect when it is set, and replaces an earlier one.

    Examples:
        >>> pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset="psa-3"))

    Args:
        pipe: a diffusers pipeline of a supported model; held by a weak reference.
        preset: name of a shipped preset, path of a YAML file, or a `Preset`; by default `psa-3`, or `psa-auto` where
            a density is given.
        preset_2: the same for `transformer_2` of pipelines with two experts; by default `preset`.
        density: what attention may cost in sparse layers, as a share of dense attention, above 0 and up to 1. The
            presets are then scaled by `Preset.at_density`.
        strict: raise instead of falling back to dense attention.

    Attributes:
        presets: the preset of each transformer, by its name in the pipeline.
        layers: the layers of each transformer, at steps where none of the preset's rules for steps applies.
        strict: as given.

    Raises:
        UnsupportedModelError: the pipeline's transformer is of no supported family.
        PresetError: a preset cannot be read, cannot have the density, or names layers that the transformer lacks.
        ValueError: `preset_2` is given, but the pipeline has one transformer.
    """

    def __init__(
        self,
        pipe: Any,
        preset: str | Path | Preset | None = None,
        *,
        preset_2: str | Path | Preset | None = None,
        density: float | None = None,
        strict: bool = False,
    ) -> None:
        transformers = find_transformers(pipe)
        if preset_2 is not None and "transformer_2" not in transformers:
            raise ValueError(f"preset_2={preset_2!r}: {type(pipe).__name__} has no second transformer here")
        let_guiders_find(PSAProcessor, lambda attn: attn.processor.original_of(attn))
        self.strict = strict
        self.presets = dict.fromkeys(transformers, choose_preset(preset, density))
        if preset_2 is not None:
            self.presets["transformer_2"] = choose_preset(preset_2, density)
        self._family = find_family(next(iter(transformers.values())))
        self._fallbacks = Fallbacks(strict)
        self._attention = TokenAttention(self._family, self._fallbacks, strict)
        self._calls = LayerCalls(self._family, self._attention)
        modules = {
            name: self._layer_modules(transformer, f"{name}." if len(transformers) > 1 else "")
            for name, transformer in transformers.items()
        }
        layers = {name: StepLayers(self.presets[name], list(each.values())) for name, each in modules.items()}
        self.layers = {name: list(each.plain.values()) for name, each in layers.items()}
        names = {name: [layer.name for layer in each] for name, each in self.layers.items()}
        self._runs = Runs(pipe, self.presets, names, self._family.timesteps)
        self._sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        # What `install` replaced; and whether this one comes back where another one's `install` replaced it.
        self._replaced: weakref.ref[Replaced] | None = None
        self._comes_back = False
        self._patches = [
            self._patch(name, transformer, modules[name], layers[name]) for name, transformer in transformers.items()
        ]
        self._waiting = Waiting(self, transformers.values())

    def install(self) -> Replaced:
        """Set this processor on all attention modules of the pipeline's transformers.

        Returns:
            What `give_back` puts back; it does so for as long as the caller keeps that.

        Raises:
            PSAFallbackError: with `strict`, if a layer that the preset wants sparse has a processor that PSA does not
                know.
        """
        self._tell_of_foreign_processors()
        others = {
            attn: attn.processor
            for attn in self._sites
            if isinstance(attn.processor, PSAProcessor) and attn.processor is not self
        }
        for earlier in others.values():
            earlier._comes_back = True
        replaced = Replaced(others)
        self._replaced = weakref.ref(replaced)
        for attn in self._sites:
            set_processor(attn, self)
        self._waiting.stop()
        for patch in self._patches:
            patch.attach()
        return replaced

    def stats(self) -> RunStats:
        """Return the statistics of the last run; waits for the device."""
        return self._runs.stats({patch.name: patch.transformer() for patch in self._patches if patch.attached})

    def is_set(self) -> bool:
        """As `PatchingProcessor.is_set`."""
        return any(patch.holds() for patch in self._patches)

    def original_of(self, attn: torch.nn.Module) -> Any:
        """The processor that an attention module had before this one.

        Raises:
            RuntimeError: this one was made for another pipeline, so that nobody knows.
        """
        if (site := self._sites.get(attn)) is None:
            raise RuntimeError(ELSEWHERE.format(kind=type(attn).__name__))
        return site.original

    def replays_were_finite(self) -> bool:
        """Whether the outputs of all replays since the last question are finite; waits for the device.

        If not, their runs have to be made again. Then nothing is replayed, and what is not finite is computed again.
        """
        return self._attention.guard.replays_were_finite()

    def record_masks(self, recorder: MaskRecorder | None) -> None:
        """From now on, hand the block lists of sparse calls to a recorder; None stops that."""
        self._attention.mask_recorder = recorder

    def compute_with(self, compute: Compute | None) -> None:
        """From now on, compute sparse layers with another function (see `TokenAttention.compute`); None stops that."""
        self._attention.compute = compute

    def restore(self) -> None:
        """Give the attention modules that still have this processor their own ones back."""
        shared, self._comes_back = False, False
        self._take_replaced()
        self._waiting.stop()
        for patch in self._patches:
            transformer, held = patch.transformer(), patch.holds()
            for attn, site in patch.sites.items():
                if attn.processor is self:
                    if transformer is not None:
                        patch.sync_stock_settings(transformer, site)
                    set_processor(attn, site.original)
            patch.detach()
            shared |= held and transformer is not None and parallel_config(transformer) is not None
        if self._family.text != "none" and shared:
            warnings.warn(
                f"without PSAProcessor, {self._family.name} computes wrong attention in this context parallelism; "
                "do not run it so",
                PSAFallbackWarning,
                stacklevel=2,
            )

    def give_back(self) -> None:
        """As `restore`; and those processors of this kind come back that this one replaced, if nobody took them off.

        What else has been set on a module since then stays.
        """
        back = [
            (attn, earlier) for attn, earlier in self._take_replaced() if attn.processor is self and earlier._comes_back
        ]
        self.restore()
        for attn, earlier in back:
            set_processor(attn, earlier)
        for earlier in {earlier for _, earlier in back}:
            earlier._attach()

    @with_names
    def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Output:
        """Compute the attention of one module; arguments and result are those of the processor that it had before."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.arrive_in_graph()
        site = site_of(attn) if compiling else self._sites.get(attn)
        if site is None:
            raise RuntimeError(ELSEWHERE.format(kind=type(attn).__name__))
        if isinstance(site, LayerSite):
            if not compiling and not site.patch.attached:
                self._arrive()
            attend = self._calls.in_graph if compiling else self._calls.eager
            if (attended := attend(attn, site, args, kwargs)) is not None:
                return attended
        return site.call_original(attn, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedProcessor:
        return copied_processor(self._sites, memo)

    def arrive(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """As `PatchingProcessor.arrive`."""
        for patch in self._attach():
            if patch.transformer() is transformer:
                patch.begin(transformer, args, kwargs)

    @torch.compiler.assume_constant_result
    def arrive_in_graph(self) -> bool:
        """Called while a block is traced: set the hooks before the graph is chosen, if no earlier call has done so."""
        self._arrive()
        if any(not patch.attached and patch.holds() and patch.rivals() for patch in self._patches):
            raise RuntimeError(RIVALS)
        return True

    def _arrive(self) -> None:
        """Set the hooks, begin the current forward. `set_attn_processor` does not tell a processor that it is set."""
        for patch in self._attach():
            patch.begin_late()

    def _attach(self) -> list[Patch]:
        """Attach the patches of transformers on which this processor was set, and return those that are new."""
        found = [patch for patch in self._patches if not patch.attached and patch.holds() and not patch.rivals()]
        if found:
            self._tell_of_foreign_processors()
            self._waiting.stop()
        for patch in found:
            patch.attach()
        for patch in self._patches if found else ():
            if not patch.attached and patch.is_free():
                patch.attach()  # to warn of a transformer that was left out; of an expert at once
                if patch.name not in OF_OTHER_WORKFLOWS:
                    self._fallbacks.warn_or_raise(tell_left_out(patch.name))
        return found

    def _take_replaced(self) -> list[tuple[Any, PSAProcessor]]:
        replaced = None if self._replaced is None else self._replaced()
        return [] if replaced is None else replaced.take()

    def _layer_modules(self, transformer: torch.nn.Module, prefix: str) -> dict[torch.nn.Module, str]:
        """The names of a transformer's layers by their modules."""
        return {attn: prefix + name for name, attn in self._family.self_attentions(transformer).items()}

    def _patch(
        self, name: str, transformer: torch.nn.Module, modules: dict[torch.nn.Module, str], layers: StepLayers
    ) -> Patch:
        """Make the patch of a transformer, with all its attention modules and their processors."""
        patch = Patch(self, name, transformer, self._family, self._runs, self._attention, layers)
        sites: dict[torch.nn.Module, Site] = {}
        foreign: dict[str, list[LayerSite]] = {}
        readers = self._family.video_readers(transformer)
        for attn in attention_modules(transformer):
            original = own_processor(attn)
            if isinstance(original, PSAProcessor):
                original = original.original_of(attn)
            if attn not in modules:
                sites[attn] = Site(original, attn in readers)
                continue
            sites[attn] = layer = LayerSite(patch, original, layers.plain[modules[attn]])
            if (reason := self._family.why_not_imitated(original)) is not None:
                foreign.setdefault(reason, []).append(layer)
        for reason, alike in foreign.items():
            more = f" and {len(alike) - 1} more layers" if len(alike) > 1 else ""
            for site in alike:
                site.not_imitated = f"{alike[0].layer.name}{more}: {reason}"
        patch.know(sites)
        self._sites.update(sites)
        return patch

    def _tell_of_foreign_processors(self) -> None:
        for site in self._sites.values():
            if not isinstance(site, LayerSite) or site.not_imitated is None:
                continue
            if site.may_be_sparse:
                self._fallbacks.warn_or_raise(site.not_imitated)
