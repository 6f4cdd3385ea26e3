"""Forwards that somebody captures into CUDA graphs as they come, and replays in place of what the model computes.

The hooks of the patch stay around both: they find the step, decide the route of every layer and look at the output. So
nobody states a step, as `stated_step` asks of those who replay whole forwards by themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from psa_diffusers.patch.hooks import patch_of
from psa_diffusers.patch.run import Forward, Note
from psa_diffusers.patch.sites import Layer, LayerSite
from psa_kernels import BlockLists
from psa_presets import Preset


def attended(transformer: torch.nn.Module) -> Hashable | None:
    """What the layers attend in the forward that runs now: equal for forwards that one graph can serve.

    None if no graph can, because the forward looks at values, is shared by several GPUs, or leaves something for a
    later one, such as lists.
    """
    if (patch := patch_of(transformer)) is None:
        return ()
    forward, attention = patch.forward, patch.attention
    if forward.stated or forward.watch or forward.share is not None or attention.compute or attention.guard.at_once:
        return None
    sites = [site for site in patch.sites.values() if isinstance(site, LayerSite)]
    routes = [forward.routes[site.layer.name] for site in sites]
    preset = sites[0].layer.preset  # all layers have one
    kept = kept_key(preset) is not None
    if any(route.full or route.corrects or (route.sparse and kept) for route in routes):
        return None
    if any(site.skips_scores for site in sites):
        return None
    recorder = attention.mask_recorder
    recorded = None if recorder is None else recorder.layers
    layers = [forward.at_step(site.layer) for site in sites]
    computed = tuple((*route, layer.spec, layer.order) for route, layer in zip(routes, layers, strict=True))
    # Which kernel serves a call depends on these two keys as well.
    return forward.grid, recorded, preset.min_tokens, preset.float32_on_gpu, computed


def kept_key(preset: Preset) -> str | None:
    """A key of a preset by which sparse forwards or those before them leave something for later ones; None without."""
    keys = {"refresh": preset.refresh > 1, "share_guidance": preset.share_guidance, "correction": preset.correction}
    return next((key for key, is_set in keys.items() if is_set), None)


class Recording:
    """What a forward noted while it was captured, which is noted again at every replay.

    Attributes:
        layers: names of the layers whose block lists are recorded.
        lists: those lists, each with its layer; each replay writes them anew, into the same memory.
        figures: int64 `[n]`: what its statistics counted, one call after the other, written anew likewise; None if
            nothing was sparse.
    """

    def __init__(self, layers: tuple[str, ...] = ()) -> None:
        self.layers = layers
        self.lists: list[tuple[Layer, BlockLists]] = []
        self.figures: torch.Tensor | None = None
        self._notes: list[Note] = []

    def record(self, layer: Layer, forward: Forward, lists: BlockLists) -> None:
        """As `ListRecorder.record`."""
        if layer.name in self.layers:
            self.lists.append((layer, lists))

    def keep(self, notes: list[Note]) -> None:
        """Keep what was noted; what it counted goes into one tensor."""
        counted = [note.stats.listed.flatten().long() for note in notes if note.stats is not None]
        self._notes, self.figures = notes, torch.cat(counted) if counted else None

    def notes(self, forward: Forward) -> Iterator[Note]:
        """What a replay attended in place of a forward; never waits for the device."""
        sizes = [note.stats.listed.numel() for note in self._notes if note.stats is not None]
        counted = iter(() if self.figures is None else self.figures.clone().split(sizes))
        for note in self._notes:
            stats = note.stats
            if stats is not None:
                stats = replace(stats, listed=next(counted).view(stats.listed.shape))
            yield note._replace(step=forward.step, stats=stats)


@contextmanager
def capturing(transformer: torch.nn.Module) -> Iterator[Recording]:
    """The forward that runs now is being captured; its hooks have been called, for the forward itself."""
    if (patch := patch_of(transformer)) is None:
        yield Recording()
        return
    forward, recorder, notes = patch.forward, patch.attention.mask_recorder, list[Note]()
    recording = Recording(() if recorder is None else recorder.layers)
    patch.forward = replace(forward, captured=True, transformer=transformer, notes=notes)
    patch.attention.mask_recorder = None if recorder is None else recording
    try:
        yield recording
    finally:
        patch.forward, patch.attention.mask_recorder = forward, recorder
    recording.keep(notes)


def note_replay(transformer: torch.nn.Module, recording: Recording) -> None:
    """Note in the forward that runs now what a replay attended in its place; never waits for the device."""
    if (patch := patch_of(transformer)) is None:
        return
    patch.forward = forward = replace(patch.forward, replayed=True)
    forward.notes.extend(recording.notes(forward))
    if (recorder := patch.attention.mask_recorder) is not None:
        for layer, lists in recording.lists:
            recorder.record(layer, forward, lists)
