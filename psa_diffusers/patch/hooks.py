"""The hooks on one patched transformer: each forward is decided about before it begins, and looked at when it ends."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from psa_diffusers.diffusers_internals import keeps_state_between_forwards, parallel_config
from psa_diffusers.families import ModelFamily
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.context_parallel import Grid, Ulysses, share_of
from psa_diffusers.patch.dense_reasons import Facts, Fallbacks, dense_reason
from psa_diffusers.patch.finite_guard import FiniteGuard, is_finite
from psa_diffusers.patch.list_cache import keeps_lists
from psa_diffusers.patch.run import NO_GRID, Forward, Route
from psa_diffusers.patch.runs import Runs
from psa_diffusers.patch.schedule import UNKNOWN, UnknownStepError
from psa_diffusers.patch.sites import Layer, NotCopied, Site, publish, withdraw
from psa_diffusers.presets import Preset

if TYPE_CHECKING:
    from psa_diffusers.patch.processor import PSAProcessor

UNHOOKED = f"{UNKNOWN}the transformer's forward was called directly, past its hooks; call the transformer itself"

_patches: weakref.WeakKeyDictionary[torch.nn.Module, Patch] = weakref.WeakKeyDictionary()


class Patch(NotCopied):
    """What a processor is to one transformer. A transformer has one patch at a time: a newcomer evicts it.

    Attributes:
        name: of the transformer in the pipeline.
        sites: its attention modules.
        forward: the one that is going on; outside of any, one in which all layers are dense.
    """

    def __init__(
        self,
        processor: PSAProcessor,
        kind: type[PSAProcessor],
        name: str,
        transformer: torch.nn.Module,
        family: type[ModelFamily],
        preset: Preset,
        runs: Runs,
        attention: TokenAttention,
        fallbacks: Fallbacks,
    ) -> None:
        self.name, self._family, self._runs, self._attention = name, family, runs, attention
        self._fallbacks, self._guard = fallbacks, FiniteGuard(fallbacks, processor.strict)
        self._kind = kind
        self.processor = weakref.ref(processor)
        self.transformer = weakref.ref(transformer)
        self.sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        self._windows_matter = keeps_lists(preset)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.forward = self._outside = runs.outside({})

    def add(self, attn: torch.nn.Module, site: Site) -> None:
        """Note an attention module of the transformer."""
        self.sites[attn] = site
        self.forward = self._outside = self._runs.outside(
            {each.layer.name: _dense(each.layer, UNHOOKED) for each in self.sites.values() if each.layer is not None}
        )

    def is_attached(self) -> bool:
        """Whether this is the patch of its transformer."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Set the hooks; another patch's go."""
        transformer = self.transformer()
        if transformer is None or self._hooks:
            return
        earlier = _patches.get(transformer)
        if earlier is not None:
            earlier.detach()
        _patches[transformer] = self
        self._hooks = [
            transformer.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(self._end, with_kwargs=True, prepend=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks, if they are there, and all that was noted on modules."""
        transformer = self.transformer()
        while self._hooks:
            self._hooks.pop().remove()
        if transformer is not None and _patches.get(transformer) is self:
            del _patches[transformer]
        for attn, site in self.sites.items():
            withdraw(attn, site)
        self.forward = self._outside

    def is_free(self) -> bool:
        """Whether its transformer has no patch."""
        transformer = self.transformer()
        return transformer is not None and transformer not in _patches

    def holds(self) -> bool:
        """Whether any module of its transformer has the processor."""
        return any(attn.processor is self.processor() for attn in self.sites)

    def has_rival(self) -> bool:
        """Whether another processor of this kind is on the transformer too."""
        return any(
            isinstance(attn.processor, self._kind) and attn.processor is not self.processor() for attn in self.sites
        )

    def begin_late(self) -> None:
        """Begin the forward that is going on already: its first attention told that the processor was set."""
        transformer = self.transformer()
        inputs = None if transformer is None else _going_on(transformer)
        if inputs is not None:
            self.begin(transformer, *inputs)
            # A hook that is set during a forward may not be called at its end.
            self.forward = replace(self.forward, watch=True)

    # Compiled into a graph of the whole transformer, it would be run from what it saw the first time.
    @torch.compiler.disable
    def begin(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook, which comes before anything else touches the inputs."""
        if self.processor() is None:  # taken off by hand, and forgotten
            self.detach()
            return
        newcomer = next(
            (attn.processor for attn in self.sites if isinstance(attn.processor, self._kind) and not self.holds()), None
        )
        if newcomer is not None:
            newcomer.arrive(transformer, args, kwargs)
            return
        inputs = {**dict(zip(_argument_names(type(transformer)), args, strict=False)), **kwargs}
        grid = self._family.token_grid(transformer, inputs)
        share, no_share = share_of(transformer, self._family, grid)
        unknown = None
        try:
            latents = _latents(inputs) if self._windows_matter else None
            forward = self._runs.enter(transformer, self.name, inputs.get("timestep"), latents)
        except UnknownStepError as error:
            unknown = str(error)
            forward = self._runs.outside({})
        self.forward = self._decide(forward, grid, share, no_share, unknown)
        if forward.run.asks_first(self.name) and (
            parallel_config(transformer) is not None or keeps_state_between_forwards(transformer)
        ):
            forward.run.watch = True
        watch = forward.run.watch and not forward.run.model_not_finite
        self.forward = replace(self.forward, watch=watch)
        self._inform_modules(transformer)

    def _decide(
        self, forward: Forward, grid: Grid | None, share: Ulysses | None, no_share: str | None, unknown: str | None
    ) -> Forward:
        """The forward with the routes of all layers; those that never call the processor are noted at once."""
        mine = self.processor()
        left_out = mine.is_set() and all(attn.processor is site.original for attn, site in self.sites.items())
        routes = {}
        for attn, site in self.sites.items():
            layer = site.layer
            if layer is None:
                continue
            facts = Facts(site, attn.processor, self._kind, self.name, left_out, unknown, no_share, grid)
            wanted = layer.spec is not None and (
                unknown is not None or forward.step >= forward.run.dense_steps[self.name]
            )
            if attn.processor is site.original and not left_out:
                wanted = False  # somebody took the patch off this module
            reason = dense_reason(facts) if wanted else None
            routes[layer.name] = Route(wanted and reason is None, reason)
            if attn.processor is not mine:
                self._attention.note_dense(forward, layer, reason)
        return replace(forward, routes=routes, grid=grid or NO_GRID, share=share)

    def _inform_modules(self, transformer: torch.nn.Module) -> None:
        """What graphs and stock processors go by, which cannot ask for the forward."""
        always = not self._family.stock_traceable or (self.forward.share is not None and self._family.text != "none")
        for attn, site in self.sites.items():
            if attn.processor is self.processor():
                publish(attn, site)
                self.sync_stock_settings(transformer, site)
            if site.layer is not None:
                site.in_graph = self.forward.routes[site.layer.name].sparse or always

    def sync_stock_settings(self, transformer: torch.nn.Module, site: Site) -> None:
        """Give the module's own processor what diffusers has since set on this one, or on the transformer."""
        config = parallel_config(transformer)
        if config is not None and site.layer is None and self._family.replicates_text:
            config = None
            if vars(site.original).get("_parallel_config", self) is not None:
                # A copy, made once: self-attention may have the same object, and does share its heads.
                site.original = copy.copy(site.original)
                site.original._parallel_config = None
        backend = self.processor()._attention_backend
        for name, value in (("_attention_backend", backend), ("_parallel_config", config)):
            if value is not None and hasattr(site.original, name):
                setattr(site.original, name, value)

    @torch.compiler.disable
    def _end(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: gives the output of the forward that was computed again, or None to keep the first one."""
        forward, again = self.forward, None
        try:
            spoiled = self._guard.is_spoiled(forward, output)
            if spoiled and not forward.watch:
                forward.run.watch = True
                forward.run.lists.forget_step(forward.step)
                forward.notes.clear()
                self._note_unreached(forward)
                self.forward = replace(forward, watch=True)
                again = transformer.forward(*args, **kwargs)
                spoiled = not forward.run.model_not_finite and not is_finite(again)
            if spoiled:
                self._guard.blame_model(forward, "the transformer's output")
        finally:
            self.forward = self._outside
        return again

    def _note_unreached(self, forward: Forward) -> None:
        for attn, site in self.sites.items():
            if site.layer is not None and attn.processor is not self.processor():
                forward.note(site.layer, None, forward.routes[site.layer.name].reason)

    def note_dense(self, layer: Layer) -> None:
        """Note that a layer is dense in this forward, as was decided before it."""
        self._attention.note_dense(self.forward, layer, self.forward.routes[layer.name].reason)

    def attend(
        self,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        text: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`TokenAttention.attend` in the forward that is going on."""
        return self._attention.attend(self.forward, layer, q, k, v, mask, text)


def _dense(layer: Layer, reason: str) -> Route:
    return Route(False, None if layer.spec is None else reason)


def _latents(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """What tells windows of a long video apart: the noisy latents."""
    latents = inputs.get("hidden_states")
    return latents if torch.is_tensor(latents) else None


def _going_on(transformer: torch.nn.Module) -> tuple[tuple, dict[str, Any]] | None:
    """What a module was called with, if its call is going on: its arguments stand in the frame of torch's `__call__`."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl" and frame.f_locals.get("self") is transformer:
            return frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None


@functools.cache
def _argument_names(transformer: type[torch.nn.Module]) -> tuple[str, ...]:
    """Names of what the forward of a class of transformers takes, in order."""
    return tuple(inspect.signature(transformer.forward).parameters)[1:]
