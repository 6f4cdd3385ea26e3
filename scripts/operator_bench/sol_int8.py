"""Sol-Attn as engines use it: `sol_attn` of the package comfy-kitchen, with queries and keys in 8-bit integers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

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
        sol_attn = importlib.import_module("comfy_kitchen").sol_attn
        head_dim = qkv[0].shape[-1]
        filled = [F.pad(x, (0, HEAD_DIM - head_dim)).contiguous() for x in qkv]
        settings = {"topk_ratio" if self.kind == "top-k" else "tau": self.value}
        return lambda: sol_attn(*filled, scale=head_dim**-0.5, **settings)[..., :head_dim]

    def density(self, q: torch.Tensor, k: torch.Tensor) -> float:
        """Share of pairs of blocks that are exact, by the package's own definition, a mean over heads.

        They are those whose mean score is among the largest, or above `tau` times the standard deviation that a row of
        means of keys has; and those beside the diagonal.
        """
        scale, found = q.shape[-1] ** -0.5, []
        for head in range(q.shape[2]):
            queries, keys = (_means(x[:, :, head].float()) for x in (q, k))
            keys = keys - keys.mean(1, keepdim=True)
            scores = queries @ keys.mT * scale
            if self.kind == "top-k":
                number = max(1, round(self.value * scores.shape[-1]))
                exact = scores >= scores.topk(number, -1).values[..., -1:]
            else:
                deviation = (queries.square() @ keys.square().mean(1, keepdim=True).mT).sqrt() * scale
                exact = scores > self.value * deviation
            index = torch.arange(scores.shape[-1], device=q.device)
            found.append((exact | ((index[:, None] - index).abs() <= 1)).float().mean())
        return torch.stack(found).mean().item()


RULES = (Rule("top-k", 0.10), Rule("top-k", 0.15), Rule("top-k", 0.25), Rule("tau", 1.0), Rule("tau", 1.3))


def _means(x: torch.Tensor) -> torch.Tensor:
    """Means of blocks of tokens of `[B, N, D]`: `[B, blocks, D]`."""
    missing = -x.shape[1] % BLOCK
    sizes = torch.full((x.shape[1] // BLOCK + bool(missing), 1), float(BLOCK), device=x.device)
    sizes[-1] -= missing
    return F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, BLOCK)).sum(2) / sizes
