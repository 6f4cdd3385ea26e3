"""Forwards that somebody captures into CUDA graphs as they come, and replays in place of what the model computes.

The hooks of the patch stay around both: they find the step, decide the route of every layer and look at the output. So
nobody states a step, as `stated_step` asks of those who replay whole forwards by themselves.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from psa_diffusers.patch.hooks import Patch, patch_of
from psa_diffusers.patch.run import Forward, Note
from psa_diffusers.patch.sites import Layer, LayerSite
from psa_kernels import BlockLists


def attended(transformer: torch.nn.Module) -> Hashable | None:
    """What the layers attend in the forward that runs now: equal for forwards that one graph can serve.

    None if no graph can, because the forward looks at values, is shared by several GPUs, or leaves something for a
    later one, such as lists.
    """
    if (patch := patch_of(transformer)) is None:
        return ()
    forward = patch.forward
    layers = [(forward.routes[each.name], forward.at_step(each)) for each in _layers(patch)]
    attention = patch.attention
    if forward.stated or forward.watch or forward.share is not None or attention.compute or attention.guard.at_once:
        return None
    if any(site.skips_scores for site in patch.sites.values() if isinstance(site, LayerSite)):
        return None
    for route, layer in layers:
        if route.full or route.corrects or (route.sparse and (layer.keeps_lists or layer.preset.correction)):
            return None
    recorder = attention.mask_recorder
    recorded = None if recorder is None else recorder.layers
    # Which kernel serves a call depends on these two keys as well; all layers have one preset.
    served = {(layer.preset.min_tokens, layer.preset.float32_on_gpu) for _, layer in layers}
    computed = tuple((*route, layer.spec, layer.order) for route, layer in layers)
    return forward.grid, recorded, frozenset(served), computed


class Recording:
    """What a forward noted while it was captured, which is noted again at every replay.

    Attributes:
        layers: names of the layers whose block lists are recorded.
        figures: int64 `[n]`: what its statistics counted, one call after the other, where each replay writes it anew;
            None if nothing was sparse.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._transformer = transformer
        self._notes: list[Note] = []
        self._lists: list[tuple[Layer, BlockLists]] = []
        self.layers: tuple[str, ...] = ()
        self.figures: torch.Tensor | None = None

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The forward that runs now is being captured; its hooks have been called, for the forward itself."""
        patch = patch_of(self._transformer)
        if patch is None:
            yield
            return
        forward, recorder = patch.forward, patch.attention.mask_recorder
        self._notes, self._lists = [], []
        patch.forward = replace(forward, captured=True, transformer=self._transformer, notes=self._notes)
        if recorder is not None:
            self.layers, patch.attention.mask_recorder = recorder.layers, self
        try:
            yield
        finally:
            patch.forward, patch.attention.mask_recorder = forward, recorder
        counted = [note.stats.listed.flatten().long() for note in self._notes if note.stats is not None]
        self.figures = torch.cat(counted) if counted else None

    def record(self, layer: Layer, forward: Forward, lists: BlockLists) -> None:
        """As `ListRecorder.record`: each replay writes the lists anew, into the same memory."""
        if layer.name in self.layers:
            self._lists.append((layer, lists))

    def replayed(self, figures: torch.Tensor | None) -> None:
        """Note in the forward that runs now what it attended; never waits for the device.

        Args:
            figures: those of the capture, as the replay wrote them.
        """
        if (patch := patch_of(self._transformer)) is None:
            return
        patch.forward = forward = replace(patch.forward, replayed=True)
        forward.notes.extend(self._notes_of(forward, figures))
        if (recorder := patch.attention.mask_recorder) is not None:
            for layer, lists in self._lists:
                recorder.record(layer, forward, lists)

    def _notes_of(self, forward: Forward, figures: torch.Tensor | None) -> Iterator[Note]:
        sizes = [note.stats.listed.numel() for note in self._notes if note.stats is not None]
        counted = iter(() if figures is None else figures.clone().split(sizes))
        for note in self._notes:
            stats = note.stats
            if stats is not None:
                stats = replace(stats, listed=next(counted).view(stats.listed.shape))
            yield note._replace(step=forward.step, stats=stats)


def _layers(patch: Patch) -> Iterator[Layer]:
    return (site.layer for site in patch.sites.values() if isinstance(site, LayerSite))
