"""FlexPrefill, as the package minference 0.1.6.0 holds it: Triton alone, for causal calls in bfloat16.

The package itself imports a CUDA extension that no wheel on an index has, so its module is imported past the package's
own beginning. A wheel without the extension:

    export MINFERENCE_FORCE_BUILD=TRUE MINFERENCE_SKIP_CUDA_BUILD=TRUE
    pip wheel --no-deps --no-build-isolation minference==0.1.6.0

It needs einops, too.

All heads attend columns and diagonals of blocks (tau = 0, the function's own default), which is the cheaper of its two
ways to choose; gamma, the share of the attention weights to cover, is searched for a density.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from functools import partial
from types import ModuleType
from typing import Any

import torch

BLOCK = 128
STEPS = 10


def load() -> ModuleType:
    """The package's module.

    Raises:
        ImportError: the package is not there.
    """
    spec = importlib.util.find_spec("minference") if "minference" not in sys.modules else None
    if spec is not None and spec.submodule_search_locations is not None:
        package = ModuleType("minference")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["minference"] = package
    return importlib.import_module("minference.modules.flexprefill")


def density(blocks: list[list[torch.Tensor]], tokens: int) -> float:
    """Share of the causal pairs of blocks, the diagonal in full as in ours, of lists of pairs without repeats."""
    rows = math.ceil(tokens / BLOCK)
    counts = [len(head) for item in blocks for head in item]
    return sum(counts) / len(counts) / (rows * (rows + 1) / 2)


def at_density(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wanted: float, module: Any = None
) -> tuple[float, partial[torch.Tensor]]:
    """A call on `[B, N, H, D]` with about that density, and the density that it has."""
    module = load() if module is None else module
    least, most = 0.0, 1.0
    for _ in range(STEPS):
        gamma = (least + most) / 2
        found = density(module.get_active_blocks(q, k, v, BLOCK, gamma, 1, 2**31 - 1), q.shape[1])
        least, most = (gamma, most) if found < wanted else (least, gamma)
    return found, partial(module.flex_prefill_attention, q, k, v, gamma, block_size=BLOCK)
