"""What quantising leaves for the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Integers:
    """Queries and keys of a call in integers.

    Attributes:
        queries: int8 `[B, Nq, Hq, D]`.
        keys: int8 `[B, Hkv, rows, D]` for each of the tensors of keys that were given, None where there was none.
        factors: float32 `[B, Hq, Nq]`: by what the products of each query are multiplied to give logits in base 2; not
            finite where a key of the head or an entry of the query is not.
        key_means: float32 `[B, Hkv, D]`: what was taken away from all keys, in the channels of the caller.
    """

    queries: torch.Tensor
    keys: list[torch.Tensor | None]
    factors: torch.Tensor
    key_means: torch.Tensor
