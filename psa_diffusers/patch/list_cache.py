"""Importance lists kept for later denoising steps and for the other guidance branch."""

from __future__ import annotations

from collections.abc import Container, Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from psa_kernels import BlockLists
from psa_presets import Preset

WINDOWS = (
    "{keys}: no effect in a loop over windows of a long video, where forwards of one step have different latents; the "
    "next step may have other windows in the same places"
)


class Moment(NamedTuple):
    """A place in a run where lists are made or wanted: step, window of a long video, guidance branch, each from 0."""

    step: int
    window: int
    branch: int


@dataclass(frozen=True)
class _Entry:
    made: Moment
    call: Hashable
    lists: BlockLists


class ListCache:
    """The lists of one run: one set for each layer, window and guidance branch; branches may share a set.

    A set takes 2 bytes for each query block and attended key block, head and batch item (4 beyond 32,767 key blocks).
    For Wan2.1-14B at 720p with psa-3 that is 25 MB a layer and branch. With the mass rule or `rest: mean` skipped key
    blocks take room too, 56 MB in all. Under the rule `budget` a row has room for all that it could pay for, with
    psa-auto also 56 MB. Nothing is kept with `refresh` 1 and separate branches.

    Attributes:
        one_step_only: whether lists serve only the step that they were made at, as in a run over windows.
        last_step: the step of the run after which no call follows; None while forwards may be run again.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int, int], _Entry] = {}
        self.one_step_only = False
        self.last_step: int | None = None

    def find(
        self, layer: str, moment: Moment, call: Hashable, preset: Preset, stated: bool = False
    ) -> BlockLists | None:
        """Lists that may serve this layer here, or None.

        Args:
            layer: name of the layer, of all transformers.
            call: all that must be equal for lists to fit: shapes, grid, device, what the layer computes and in which
                order.
            preset: says for how many steps lists serve, and whether guidance branches share them.
            stated: whether forwards of this moment may be run again; each then makes its lists anew.
        """
        entry = self._entries.get(_key(layer, moment, preset))
        if entry is None or entry.call != call or (stated and entry.made == moment):
            return None
        age = moment.step - entry.made.step
        return entry.lists if 0 <= age < (1 if self.one_step_only else preset.refresh) else None

    def keep(self, layer: str, moment: Moment, call: Hashable, preset: Preset, lists: BlockLists) -> None:
        """Keep lists that were just made, if a later call can use them."""
        if (self.one_step_only or moment.step == self.last_step) and not preset.share_guidance:
            return
        self._entries[_key(layer, moment, preset)] = _Entry(moment, call, lists)

    def rewrite(
        self, layer: str, moment: Moment, call: Hashable, preset: Preset, lists: BlockLists
    ) -> BlockLists | None:
        """Write lists into the tensors that are already kept for such a call, because captured graphs read those.

        Returns the kept lists. If there are none, nothing is kept and None is returned.
        """
        key = _key(layer, moment, preset)
        entry = self._entries.get(key)
        if entry is None or entry.call != call or entry.lists.ids.shape != lists.ids.shape:
            return None
        entry.lists.ids.copy_(lists.ids)
        entry.lists.counts.copy_(lists.counts)
        self._entries[key] = _Entry(moment, call, entry.lists)
        return entry.lists

    def forget(self, layers: Container[str]) -> None:
        """Drop the lists of some layers."""
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] not in layers}

    def forget_step(self, step: int) -> None:
        """Drop the lists that were made at this step, because they were made from values that were not finite."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.made.step != step}


def own_copy(lists: BlockLists) -> BlockLists:
    """The same lists in tensors of their own, which may be written in any mode of PyTorch."""
    with torch.inference_mode(False):
        return replace(lists, ids=lists.ids.clone(), counts=lists.counts.clone())


def _key(layer: str, moment: Moment, preset: Preset) -> tuple[str, int, int]:
    return layer, moment.window, 0 if preset.share_guidance else moment.branch


def keeps_lists(preset: Preset) -> bool:
    """Whether lists of a preset ever serve a second call."""
    return preset.refresh > 1 or preset.share_guidance


def lost_in_windows(preset: Preset) -> str | None:
    """What to tell of a preset in a run over windows; None if it keeps nothing for later steps."""
    keys = {"correction: true": preset.correction, f"refresh: {preset.refresh}": preset.refresh > 1}
    lost = ", ".join(key for key, is_set in keys.items() if is_set)
    return WINDOWS.format(keys=lost) if lost else None
