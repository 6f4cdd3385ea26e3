"""Weights for the norms of queries and keys, which models start with all alike."""

from __future__ import annotations

import torch

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def draw_norms(transformer: torch.nn.Module, seed: int = 0) -> None:
    """Draw the weights, and biases, of every norm of queries and keys: so one in another's place is seen."""
    generator = torch.Generator().manual_seed(seed)
    for module in transformer.modules():
        for name in NORMS:
            norm = getattr(module, name, None)
            if getattr(norm, "weight", None) is not None:
                norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            if getattr(norm, "bias", None) is not None:
                norm.bias.data.uniform_(-0.5, 0.5, generator=generator)
