"""What a run will cost, from shapes alone: density, arithmetic and memory. Nothing here is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from psa_diffusers.patch.list_cache import keeps_lists
from psa_diffusers.runs.check.machine import Offer
from psa_diffusers.runs.check.network import Network, Usage
from psa_kernels.call import Call
from psa_kernels.correction.reference import kept_bytes
from psa_kernels.costs import expected_density
from psa_kernels.head_groups import head_groups
from psa_kernels.lists import id_dtype, list_width
from psa_presets import Preset

# Each kind of attention with what computes it; None there: it is dense.
Uses = Sequence[tuple[Usage, Offer | None]]


@dataclass(frozen=True)
class Speedup:
    """The speedup that arithmetic alone would give, if all operations took equally long.

    Attributes:
        attention: share of a dense step's arithmetic that is attention between video tokens. It is rather too small,
            because every matrix counts as if all tokens went through it, and text is left out.
        step: how many times as fast as a dense step a sparse one would be; `run` is the same for the whole run.
    """

    attention: float
    step: float
    run: float


def mean_density(uses: Uses) -> float | None:
    """Expected density of a sparse step, its dense layers included; None where it depends on the video."""
    total = 0.0
    for usage, offered in uses:
        density = 1.0 if offered is None else expected_density(offered.call.spec, offered.call.key_blocks)
        if density is None:
            return None
        total += usage.calls * density
    calls = sum(usage.calls for usage, _ in uses)
    return total / calls if calls else None


def speedup(network: Network, density: float, sparse_steps: int, num_steps: int) -> Speedup:
    """The arithmetic of a dense and a sparse step: 4 N^2 operations a channel of each head, 2 N a weight."""
    channels = sum(shape.heads * shape.head_dim for shape in network.shapes)
    attention = 4 * network.tokens**2 * channels
    share = attention / (attention + 2 * network.tokens * network.matrices)
    step = 1 / (1 - share * (1 - density))
    return Speedup(share, step, num_steps / (num_steps - sparse_steps + sparse_steps / step))


def pyramid_bytes(offered: Offer) -> int:
    """Bytes of the pyramids that exist at the same time, for one video; 0 if they are made head by head."""
    call = offered.call
    if not offered.backend.has_pyramid:
        return 0
    head_bytes = 2 * offered.backend.pyramid_rows(call) * call.q.shape[3] * call.q.element_size()
    groups = head_groups(call.k.shape[2], head_bytes, call.q.shape.numel() * call.q.element_size())
    return head_bytes * max(group.stop - group.start for group in groups)


def list_bytes(call: Call) -> int:
    """Bytes of the lists of one call, for one video."""
    width, levels = list_width(call.spec, call.key_blocks), len(call.spec.levels)
    row = width * id_dtype(call.key_blocks).itemsize + levels * torch.int32.itemsize
    return call.q.shape[2] * call.query_blocks * row


def kept_list_bytes(preset: Preset, uses: Uses, branches: int) -> int:
    """Bytes of the lists that are kept for later calls, at most, of all layers; 0 where none are.

    Args:
        branches: of guidance.
    """
    if not keeps_lists(preset):
        return 0
    sets = 1 if preset.share_guidance else branches
    largest: dict[int, int] = {}
    for usage, offered in uses:
        if offered is not None:
            size = list_bytes(offered.call)
            largest |= {layer: max(size, largest.get(layer, 0)) for layer in usage.layers}
    return sets * sum(largest.values())


def correction_bytes(preset: Preset, uses: Uses, branches: int) -> int:
    """Bytes of the corrections of all layers, for one video; 0 where the preset has none, or no dense phase.

    Args:
        branches: of guidance, each of which has its own.
    """
    if not preset.correction or not preset.dense_steps:
        return 0
    sizes: dict[int, int] = {}
    for usage, offered in uses:
        if offered is not None:
            q, video = offered.call.q, offered.call.layout.video_queries
            sizes |= dict.fromkeys(usage.layers, kept_bytes((1, video, *q.shape[2:])))
    return branches * sum(sizes.values())
