"""Sol-Attn as engines use it: `sol_attn` of the package comfy-kitchen, with queries and keys in 8-bit integers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F

PACKAGE = "comfy_kitchen"
BLOCK = 64
HEAD_DIM = 128  # the only one that it takes


@dataclass(frozen=True)
class Rule:
    """Which blocks are attended exactly; every other one is attended as one pooled term.

    Attributes:
        kind: `top-k`, a share of the blocks; or `tau`, those above so many standard deviations.
    """

    kind: Literal["top-k", "tau"]
    value: float

    def __call__(self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], *_: Any) -> Callable[[], torch.Tensor]:
        """A call on `[B, N, H, D]` tensors; smaller heads are filled up with zeros first, which is not in the call."""
        sol_attn = importlib.import_module(PACKAGE).sol_attn
        head_dim = qkv[0].shape[-1]
        filled = [F.pad(x, (0, HEAD_DIM - head_dim)).contiguous() for x in qkv]
        settings = {"topk_ratio" if self.kind == "top-k" else "tau": self.value}
        return lambda: sol_attn(*filled, scale=head_dim**-0.5, **settings)[..., :head_dim]

    def exact(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Which pairs of blocks of `[B, N, H, D]` are exact, by the package's own definition.

        They are those whose mean score is among the largest, or above `tau` times the standard deviation that a row of
        means of keys has; and those beside the diagonal. The result is bool `[B, H, blocks, blocks]`, queries first.
        """
        queries, keys = _means(q.float()), _means(k.float())
        keys = keys - keys.mean(2, keepdim=True)
        scale, blocks = q.shape[-1] ** -0.5, keys.shape[2]
        scores = queries @ keys.mT * scale
        if self.kind == "top-k":
            number = max(1, min(blocks - 1, round(self.value * blocks)))
            exact = scores >= scores.topk(number, -1).values[..., -1:]
        else:
            deviation = (queries.square() @ keys.square().mean(2, keepdim=True).mT).sqrt() * scale
            exact = scores > self.value * deviation
        index = torch.arange(blocks, device=q.device)
        return exact | ((index[:, None] - index).abs() <= 1)

    def density(self, q: torch.Tensor, k: torch.Tensor) -> float:
        """Share of pairs of blocks that are exact, a mean over heads."""
        return self.exact(q, k).float().mean().item()


RULES = (Rule("top-k", 0.10), Rule("top-k", 0.15), Rule("top-k", 0.25), Rule("tau", 1.0), Rule("tau", 1.3))


def obstacle(device: str) -> str | None:
    """Why it cannot compute on a device, in one line; on the CPU the package has a reference in full precision."""
    if find_spec(PACKAGE) is None:
        return "the package comfy-kitchen is not installed"
    if device != "cpu" and not importlib.import_module(PACKAGE).sol_attn_is_available(torch.device(device)):
        return f"comfy-kitchen has no compiled sol_attn for {device}"
    return None


def _means(x: torch.Tensor) -> torch.Tensor:
    """Means of blocks of tokens of `[B, N, H, D]`: `[B, H, blocks, D]`."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % BLOCK
    sizes = torch.full((x.shape[2] // BLOCK + bool(missing), 1), float(BLOCK), device=x.device)
    sizes[-1] -= missing
    return F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, BLOCK)).sum(3) / sizes
