"""What every judge gives: queries, keys and values of a trained model's self-attention, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Sample:
    """One attention call of a dense run.

    Attributes:
        name: unique within the judge: the input and the layer.
        q, k, v: float32 `[1, N, H, D]`.
        grid: tokens along frames, height and width, without the text tokens.
        text_before: tokens before those of the grid, which are kept exact, as text is.
    """

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grid: Grid
    text_before: int = 0


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of tensors `[1, N, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@dataclass(frozen=True)
class Judge:
    """A trained model and what of it is looked at.

    Attributes:
        about: the model, the package it comes from, and the sample.
        names: of all samples, in order.
        samples: loads the model and yields the samples of the given names, from folders of unpacked packages.
        block_query, block_key: tokens a block, unless a setting says otherwise.
        orders: of the tokens; the first is the one of all settings that do not compare orders.
        tile: of the order `tiles`.
        every: the error is that of every so many query blocks.
    """

    name: str
    about: str
    names: tuple[str, ...]
    samples: Callable[[Sequence[Path], set[str]], Iterator[Sample]]
    block_query: int
    block_key: int
    orders: tuple[str, ...]
    tile: Grid = (4, 4, 4)
    every: int = 1


class Projections:
    """Keeps what the query, key and value projections of some attention modules give, while it is entered.

    Args:
        modules: by name, attention modules that have `q_proj`, `k_proj` and `v_proj`.
        heads: number of heads.
    """

    def __init__(self, modules: dict[str, Any], heads: int) -> None:
        self._modules, self._heads = modules, heads
        self.found: dict[str, dict[str, torch.Tensor]] = {}

    def __enter__(self) -> Projections:
        self._handles = [
            getattr(module, f"{part}_proj").register_forward_hook(self._keeper(name, part))
            for name, module in self._modules.items()
            for part in "qkv"
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keeper(self, name: str, part: str) -> Callable[..., None]:
        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            heads = output.unflatten(-1, (self._heads, -1))
            self.found.setdefault(name, {})[part] = heads.contiguous()

        return keep
