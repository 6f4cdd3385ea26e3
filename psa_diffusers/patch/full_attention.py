"""Dense steps and layers computed by the operator's kernel instead of the model's own attention (`dense_attention`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.dense_reasons import Fallbacks
from psa_diffusers.patch.run import Run
from psa_diffusers.patch.sites import Layer
from psa_kernels.full import full_attention, serves_full

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
LEFT = "dense_attention: psa has no effect, dense steps and layers stay with the model's own attention: {why}"


class FullAttention:
    """Computes dense calls, including text, with every key in full.

    Attributes:
        implementation: of the operator. Only the kernel for Hopper is faster than PyTorch's attention.
    """

    implementation = "hopper"

    def __init__(self, fallbacks: Fallbacks) -> None:
        self._fallbacks = fallbacks
        self._on: dict[torch.device, bool] = {}
        self._refused: set[tuple[str, torch.Size]] = set()

    def is_on(self, device: torch.device) -> bool:
        """Whether a device has the kernel at all; if not, warn once.

        Raises:
            PSAFallbackError: with `strict`, if it does not.
        """
        if device not in self._on:
            smallest = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=device)
            _, why = serves_full(smallest, smallest, smallest, self.implementation)
            if why is not None:
                self._fallbacks.tell(LEFT.format(why=why))
            self._on[device] = why is None
        return self._on[device]

    def was_refused(self, layer: Layer, call: AttentionCall) -> bool:
        """Whether `serves` once said no for a call like this; asking first saves the projections."""
        return (layer.name, call.hidden_states.shape) in self._refused

    def serves(self, layer: Layer, call: AttentionCall, qkv: QKV) -> bool:
        """Whether the kernel can compute a call, and is faster; if it cannot, warn once.

        Raises:
            PSAFallbackError: with `strict`, if it cannot.
        """
        served, why = serves_full(*qkv, self.implementation)
        if why is not None:
            self._fallbacks.tell(LEFT.format(why=why))
        if not served:
            self._refused.add((layer.name, call.hidden_states.shape))
        return served

    def attend(self, run: Run, qkv: QKV, after: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention in which nothing attends padding.

        Args:
            run: keeps the lists.
            qkv: each `[B, N, H, D]`, of which the last `after` tokens are text, padding last.
            lengths: how many of these are real, for each sample.

        Returns:
            The output of the first N - after tokens, and of the others, zero at padding.
        """
        first = qkv[0].shape[1] - after
        if not after or len(set(lengths)) == 1:
            parts = [(slice(None), lengths[0] if after else 0)]
        else:
            parts = [(slice(sample, sample + 1), length) for sample, length in enumerate(lengths)]
        heads, tails = [], []
        for samples, length in parts:
            q, k, v = (x[samples, : first + length] for x in qkv)
            out = full_attention(q, k, v, self.implementation, run.full_lists)
            heads.append(out[:, :first])
            tails.append(F.pad(out[:, first:], (0, 0, 0, 0, 0, after - length)))
        return (heads[0], tails[0]) if len(parts) == 1 else (torch.cat(heads), torch.cat(tails))
