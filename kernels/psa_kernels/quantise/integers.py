"""What quantising leaves for the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from psa_kernels.layout import TokenLayout


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

    def add_key_means(self, lse: torch.Tensor, q: torch.Tensor, layout: TokenLayout, scale: float) -> None:
        """Give the log-sum-exp of centred keys what the mean of the keys adds to the logits of each video query.

        Args:
            lse: float32 `[B, Hq, Nq]`, changed in place.
            q: `[B, Nq, Hq, D]`, as the caller has them.
            scale: factor on the dot products.
        """
        video = slice(layout.text_before, layout.text_before + layout.video_queries)
        means = self.key_means.repeat_interleave(q.shape[2] // self.key_means.shape[1], dim=1)
        lse[:, :, video] += torch.einsum("bnhd,bhd->bhn", q[:, video].float(), means) * scale
