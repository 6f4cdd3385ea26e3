"""The correction: what sparse attention leaves out at the last dense step is added to its outputs at later steps.

What is left out changes little between neighbouring steps. Some 16 times in a run the dense attention of a few queries
tells, head by head, how much of it still holds, so that nothing is added where nothing holds.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass

import torch

from psa_diffusers.patch.dense_reasons import Fallbacks
from psa_diffusers.patch.list_cache import Moment
from psa_diffusers.patch.sites import Layer
from psa_kernels.correction.choose import add_correction, left_out
from psa_kernels.correction.reference import Correction, correction_weights, kept_bytes, sample_tokens

NO_ROOM = "correction: true has no effect: it would take {need:.1f} GiB on {device}, of which {free:.1f} are free"
# How often in a run it is told how much of a correction holds: at every step of 16, at every third of 50.
TELLINGS = 16


@dataclass(eq=False)
class _Entry:
    """A correction, what calls have to have in common for it, and what was last told of it, at which step."""

    fits: Hashable
    correction: Correction
    weights: torch.Tensor | None = None
    step: int = -1


class Corrections:
    """The corrections of one run, one for each layer, window and guidance branch.

    Each takes half a byte for every number of the layer's output of video tokens, and 4 bytes for every token and head.
    In all, with guidance, that is 15.3 GiB for Wan2.1-14B at 720p, and 1.5 GiB for Wan2.1-1.3B at 480p.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int, int], _Entry] = {}
        self._room: dict[Moment, bool] = {}

    def has_room(self, moment: Moment, output: torch.Tensor, layers: int, fallbacks: Fallbacks) -> bool:
        """Whether the corrections of all layers of a forward fit into the device's memory; if not, warn.

        Args:
            output: `[B, N, H, D]`, as large as a layer's output of video tokens.
            layers: how many layers keep a correction.

        Raises:
            PSAFallbackError: with `strict`, if they do not fit.
        """
        if moment not in self._room:
            need = layers * kept_bytes(output.shape)
            free, gib = free_bytes(output.device), 2**30
            self._room[moment] = free is None or need <= free
            if free is not None and not self._room[moment]:
                fallbacks.tell(NO_ROOM.format(need=need / gib, device=output.device, free=free / gib))
        return self._room[moment]

    def keep(self, layer: Layer, moment: Moment, fits: Hashable, dense: torch.Tensor, sparse: torch.Tensor) -> None:
        """Keep what sparse attention leaves out of a layer's video tokens, both `[B, N, H, D]`.

        Args:
            fits: all that must be equal for the correction to be added: shapes, grid, device.
        """
        self._kept[_place(layer, moment)] = _Entry(fits, left_out(dense, sparse))

    def has(self, layer: Layer, moment: Moment) -> bool:
        """Whether there is a correction for a layer at a step."""
        return _place(layer, moment) in self._kept

    def add(
        self,
        layer: Layer,
        moment: Moment,
        fits: Hashable,
        sparse: torch.Tensor,
        dense_rows: Callable[[torch.Tensor], torch.Tensor],
        steps: int,
    ) -> None:
        """Add what still holds of a correction to a sparse output, in place; nothing if there is none.

        Args:
            sparse: of the video tokens, `[B, N, H, D]`.
            dense_rows: gives the dense attention `[B, n, H, D]` of some video tokens, named by int64 `[n]`.
            steps: of the run. After the last one the correction is gone: what follows may need the memory.
        """
        place = _place(layer, moment)
        entry = self._kept.pop(place, None) if moment.step + 1 >= steps else self._kept.get(place)
        if entry is None or entry.fits != fits:
            return
        if entry.weights is None or moment.step - entry.step >= steps_a_telling(steps):
            entry.weights, entry.step = how_much_holds(entry.correction, sparse, dense_rows), moment.step
        add_correction(sparse, entry.correction, entry.weights)

    def forget(self, layers: Container[str]) -> None:
        """Drop the corrections of some layers."""
        self._kept = {place: entry for place, entry in self._kept.items() if place[0] not in layers}


def steps_a_telling(steps: int) -> int:
    """After how many steps of a run of `steps` it is told again how much of a correction holds."""
    return max(1, round(steps / TELLINGS))


def how_much_holds(
    correction: Correction, sparse: torch.Tensor, dense_rows: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """How much of a correction is to be added to a sparse output: `[B, H]`. Arguments are as of `Corrections.add`."""
    tokens = sample_tokens(sparse.shape[1], sparse.device)
    return correction_weights(dense_rows(tokens), sparse[:, tokens], correction.of_tokens(tokens))


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free now and was not needed by any forward so far; None if that is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def _place(layer: Layer, moment: Moment) -> tuple[str, int, int]:
    """What a call has in common with those of other steps whose correction it shares."""
    return layer.name, moment.window, moment.branch
