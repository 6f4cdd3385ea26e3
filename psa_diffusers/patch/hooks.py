"""The hooks on a patched transformer: they decide each layer's route before a forward, and check its output after."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from psa_diffusers.diffusers_internals import keeps_state_between_forwards, parallel_config, skips_attention_scores
from psa_diffusers.families import DenseOnlyError, ModelFamily
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import Facts, can_be_full, dense_reason
from psa_diffusers.patch.finite_guard import is_finite
from psa_diffusers.patch.inputs import argument_names, device_of, going_on
from psa_diffusers.patch.list_cache import lost_in_windows
from psa_diffusers.patch.parallel.plan import share_of
from psa_diffusers.patch.run import NO_GRID, Forward, Route
from psa_diffusers.patch.runs import Runs
from psa_diffusers.patch.schedule import UNKNOWN, UnknownStepError
from psa_diffusers.patch.sites import Layer, LayerSite, NotPickled, PatchingProcessor, Site, publish, withdraw
from psa_diffusers.patch.stated_step import CACHED, CAPTURED, CORRECTED, FULL, SHARED, is_capturing
from psa_diffusers.patch.step_layers import StepLayers

UNHOOKED = f"{UNKNOWN}the transformer's forward was called directly, past its hooks; call the transformer itself"

_patches: weakref.WeakKeyDictionary[torch.nn.Module, Patch] = weakref.WeakKeyDictionary()


def patch_of(transformer: torch.nn.Module) -> Patch | None:
    """The patch whose hooks are set on a transformer."""
    return _patches.get(transformer)


class Patch(NotPickled):
    """The patch of one transformer by a processor. A transformer has one patch at a time: a new one replaces the old.

    Attributes:
        name: the transformer's name in the pipeline.
        sites: its attention modules.
        attention: computes its layers.
        forward: the current forward of this thread; outside of any, a placeholder in which all layers are dense.
        attached: whether its hooks are set.
    """

    def __init__(
        self,
        processor: PatchingProcessor,
        name: str,
        transformer: torch.nn.Module,
        family: type[ModelFamily],
        runs: Runs,
        attention: TokenAttention,
        layers: StepLayers,
    ) -> None:
        self.name, self.attention, self.attached = name, attention, False
        self._family, self._runs, self._layers = family, runs, layers
        self.processor, self.transformer = weakref.ref(processor), weakref.ref(transformer)
        self.sites: weakref.WeakKeyDictionary[torch.nn.Module, Site] = weakref.WeakKeyDictionary()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._outside = runs.outside({})
        self._current = threading.local()

    @property
    def forward(self) -> Forward:
        return getattr(self._current, "forward", self._outside)

    @forward.setter
    def forward(self, forward: Forward) -> None:
        self._current.forward = forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """A copy of the transformer takes its hooks along: give them a patch that does nothing."""
        idle = object.__new__(Patch)
        idle.attached = False
        return idle

    def know(self, sites: Mapping[torch.nn.Module, Site]) -> None:
        """Register the transformer's attention modules."""
        self.sites.update(sites)
        layers = [site for site in sites.values() if isinstance(site, LayerSite)]
        routes = {site.layer.name: Route(False, UNHOOKED if site.may_be_sparse else None) for site in layers}
        self._outside, self._current = self._runs.outside(routes), threading.local()

    def attach(self) -> None:
        """Set the hooks, and remove those of another patch."""
        transformer = self.transformer()
        if transformer is None or self.attached:
            return
        if (earlier := patch_of(transformer)) is not None:
            earlier.detach()
        _patches[transformer], self.attached = self, True
        self._hooks = [
            transformer.register_forward_pre_hook(self.begin, with_kwargs=True, prepend=True),
            transformer.register_forward_hook(self._end, with_kwargs=True, prepend=True, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks, if they are set, and all notes on modules."""
        transformer = self.transformer()
        while self._hooks:
            self._hooks.pop().remove()
        if self.attached and transformer is not None:
            del _patches[transformer]
        for attn, site in self.sites.items():
            withdraw(attn, site)
        self._runs.forget(self.name)
        self._current, self.attached = threading.local(), False

    def is_free(self) -> bool:
        """Whether its transformer has no patch."""
        return self.transformer() not in _patches

    def holds(self) -> bool:
        """Whether any module of its transformer has the processor."""
        return any(attn.processor is self.processor() for attn in self.sites)

    def rivals(self) -> list[PatchingProcessor]:
        """Other processors of this kind on the transformer."""
        found: list[Any] = [attn.processor for attn in self.sites]
        return [each for each in found if isinstance(each, PatchingProcessor) and each is not self.processor()]

    def _owner(self) -> PatchingProcessor:
        owner = self.processor()
        assert owner is not None, "a patch without its processor is detached before anything asks for it"
        return owner

    def begin_late(self) -> None:
        """Begin a forward that is running already: only its first attention call showed that the processor is set."""
        transformer = self.transformer()
        if transformer is not None and (inputs := going_on(transformer)) is not None:
            self.begin(transformer, *inputs)
            # A hook that is set during a forward may not be called at its end.
            self.forward = replace(self.forward, watch=not self.forward.captured)

    # Must stay eager: a trace would bake in the first step.
    @torch.compiler.disable
    def begin(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        """A forward pre-hook, which runs before anything else touches the inputs.

        Raises:
            RuntimeError: the forward is being captured into a CUDA graph, and cannot be.
        """
        if not self.attached or kwargs is None:  # a copy's, or one that a hook before it has removed
            return
        if self._runs.stated is None and is_capturing():
            raise RuntimeError(CAPTURED)
        if self.processor() is None:  # taken off by hand, and forgotten
            self.detach()
        elif not self.holds() and (rivals := self.rivals()):
            rivals[0].arrive(transformer, args, kwargs)
        else:
            kind: Any = type(transformer)
            inputs = {**dict(zip(argument_names(kind), args, strict=False)), **kwargs}
            self.forward = self._decide(transformer, inputs)
            self._inform_modules(transformer)

    def _decide(self, transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> Forward:
        grid, refused = None, None
        try:
            grid = self._family.token_grid(transformer, inputs)
        except DenseOnlyError as error:
            refused = str(error)
        tokens = None if grid is None else self._family.tokens(inputs, grid)
        share, unshared = share_of(transformer, self._family, grid, tokens)
        unknown = None
        try:
            timestep, noisy = self._family.timestep(inputs), self._family.noisy_part(inputs)
            forward = self._runs.enter(transformer, self.name, timestep, noisy)
        except UnknownStepError as error:
            forward, unknown = self._runs.outside({}), str(error)
        if forward.captured and (share is not None or unshared is not None):
            raise RuntimeError(SHARED)
        if forward.captured and keeps_state_between_forwards(transformer):
            raise RuntimeError(CACHED)
        run, mine, routes = forward.run, self._owner(), dict[str, Route]()
        if run.asks_first(self.name) and keeps_state_between_forwards(transformer):
            run.watch = True
        if forward.window and (lost := lost_in_windows(self._layers.preset)):
            self.attention.tell(lost)
        layers = self._layers.at(forward.step, run.steps)
        left_out = mine.is_set() and all(attn.processor is site.original for attn, site in self.sites.items())
        # Layers differ in no more than this, as all have one preset: so a few routes serve all of them.
        known: dict[tuple[int, bool, str | None, bool], Route] = {}
        unreached = self._current.unreached = list[LayerSite]()
        for attn, site in self.sites.items():
            if not isinstance(site, LayerSite):
                continue
            layer = layers[site.layer.name]
            if (processor := attn.processor) is not mine:
                unreached.append(site)
            # If a module has its own processor back, somebody took it out of the patch on purpose.
            wanted = layer.spec is not None and (left_out or processor is not site.original)
            kind = id(processor), wanted, site.not_imitated, layer.spec is None
            if (route := known.get(kind)) is None:
                if unknown is None:
                    wanted = wanted and forward.step not in run.dense[self.name].steps
                facts = Facts(site, processor, mine, left_out, unknown, unshared, refused, grid)
                route = known[kind] = self._route(forward, layer, facts, wanted, lambda: device_of(transformer, inputs))
            routes[layer.name] = route
            if forward.captured and layer.preset.correction and site.may_be_sparse:
                self.attention.tell(CORRECTED)
        forward = replace(
            forward,
            routes=routes,
            layers=layers,
            grid=grid or NO_GRID,
            share=share,
            watch=run.watch and not run.model_not_finite and not forward.captured,
            transformer=transformer if forward.captured else None,
        )
        self._note_unreached(forward)
        return forward

    def _route(
        self, forward: Forward, layer: Layer, facts: Facts, wanted: bool, device: Callable[[], torch.device]
    ) -> Route:
        """How a layer is computed.

        Args:
            layer: as it is at this step.
            wanted: whether the preset wants it sparse at this step.
            device: tells where the forward runs.
        """
        if wanted:
            reason = dense_reason(facts)
            return Route(reason is None, reason)
        if self._corrects(forward, layer) and dense_reason(facts) is None:
            return Route(False, corrects=True)
        full = layer.preset.dense_attention == "psa" and can_be_full(facts)
        if full and forward.captured:
            full = False  # its lists live as long as a run
            self.attention.tell(FULL)
        return Route(False, full=full and self.attention.full.is_on(device()))

    def _corrects(self, forward: Forward, layer: Layer) -> bool:
        """Whether this is the last step of the dense phase, where what sparse attention would leave out is kept.

        Nothing is kept for a layer that the preset keeps dense, or if the next step is dense too.
        """
        run, step = forward.run, forward.step
        if not layer.preset.correction or layer.spec is None or forward.captured or step + 1 >= run.steps:
            return False
        dense = run.dense[self.name]
        return step + 1 == dense.first and step + 1 not in dense.steps

    def _note_unreached(self, forward: Forward) -> None:
        """Note the layers that never call the processor, because their module has another one."""
        for site in self._current.unreached:
            self.attention.note_dense(forward, site.layer, forward.routes[site.layer.name].reason)

    def _inform_modules(self, transformer: torch.nn.Module) -> None:
        """Write onto modules what graphs and stock processors need: they cannot ask for the forward."""
        routes, share, mine = self.forward.routes, self.forward.share, self._owner()
        anyway = not self._family.stock_traceable or (share is not None and self._family.text != "none")
        # There diffusers asks the other ranks for their numbers, and reads the answer. Nobody else has the backends.
        breaks = share is not None and share.any_numbers and mine._attention_backend is None
        changed = mine.has_backend() or parallel_config(transformer) is not None
        for attn, site in self.sites.items():
            if attn.processor is mine:
                publish(attn, site)
                if changed:
                    self.sync_stock_settings(transformer, site)
            if isinstance(site, LayerSite):
                site.skips_scores = skips_attention_scores(attn)
                site.in_graph = anyway or routes[site.layer.name].ours
                site.shared = share is not None
                site.breaks_graphs = breaks and site.not_imitated is None

    def sync_stock_settings(self, transformer: torch.nn.Module, site: Site) -> None:
        """Pass settings on to the module's own processor that diffusers has set on ours, or on the transformer."""
        config = parallel_config(transformer)
        has_all = self._family.replicates_text and not isinstance(site, LayerSite) and not site.reads_video
        if config is not None and has_all:
            config = None
            if vars(site.original).get("_parallel_config", self) is not None:
                # A copy, made once: self-attention may have the same object, and its heads are shared among ranks.
                site.original = copy.copy(site.original)
                site.original._parallel_config = None
        given: dict[str, Any] = {} if config is None else {"_parallel_config": config}
        if self._owner().has_backend():
            given["_attention_backend"] = self._owner()._attention_backend
        for name, value in given.items():
            if hasattr(site.original, name):
                setattr(site.original, name, value)

    @torch.compiler.disable
    def _end(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook: return the output of a second computation if one was needed, or None to keep the first."""
        if not self.attached:
            return None
        forward, guard, again = self.forward, self.attention.guard, None
        if forward.captured:
            self.forward = self._outside
            return None
        try:
            spoiled = guard.is_spoiled(forward, output)
            if spoiled and not forward.watch:
                forward.run.watch = True
                forward.run.lists.forget_step(forward.step)
                forward.notes.clear()
                self._note_unreached(forward)
                self.forward = replace(forward, watch=True)
                again = transformer.forward(*args, **kwargs)
                spoiled = not forward.run.model_not_finite and not is_finite(again)
            if spoiled:
                guard.report_model_not_finite(forward, "the transformer's output")
        finally:
            self.forward = self._outside
            self._runs.leave(forward)
        return again
