"""Importance lists kept for later denoising steps and for the other guidance branch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from psa_diffusers.patch.step import DenoisingStep
from psa_diffusers.presets import Preset
from psa_kernels import BlockLists


@dataclass(frozen=True)
class _Entry:
    step: int
    call: Hashable
    lists: BlockLists


class ListCache:
    """Lists of the current run, one set a layer and guidance branch, or one a layer where branches share.

    A set takes 2 bytes for each query block and attended key block, head and batch item (4 beyond 32,767 key blocks);
    for Wan2.1-14B at 720p with psa-3 that is 25 MB a layer and branch. With the mass rule or `rest: mean` skipped key
    blocks take as much, 56 MB in all. Nothing is kept with `refresh` 1 and separate branches. A run drops the lists of
    the last one.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._run = 0

    def find(self, layer: str, at: DenoisingStep, call: Hashable, preset: Preset) -> BlockLists | None:
        """Lists that may serve this layer at this step, or None.

        Args:
            layer: name of the layer, of all transformers.
            at: where the run stands.
            call: whatever must be equal for lists to fit: shapes, grid, device.
            preset: says for how many steps lists serve, and whether guidance branches share them.
        """
        if at.run != self._run:
            self.clear()
            self._run = at.run
        entry = self._entries.get(_key(layer, at, preset))
        fits = entry is not None and entry.call == call and 0 <= at.step - entry.step < preset.refresh
        return entry.lists if fits else None

    def keep(self, layer: str, at: DenoisingStep, call: Hashable, preset: Preset, lists: BlockLists) -> None:
        """Keep lists that were just made, if a later call can use them."""
        if preset.refresh > 1 or preset.share_guidance:
            self._entries[_key(layer, at, preset)] = _Entry(at.step, call, lists)

    def forget_step(self, at: DenoisingStep) -> None:
        """Drop the lists that were made at this step."""
        self._entries = {key: entry for key, entry in self._entries.items() if entry.step != at.step}

    def clear(self) -> None:
        """Drop all lists."""
        self._entries.clear()


def _key(layer: str, at: DenoisingStep, preset: Preset) -> tuple[str, int]:
    return layer, 0 if preset.share_guidance else at.branch
