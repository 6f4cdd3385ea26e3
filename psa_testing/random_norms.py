"""Weights for the norms of queries and keys, which models start with all alike."""

from __future__ import annotations

import torch

NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "query_norm", "key_norm")
RANGES = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5)}


def draw_norms(transformer: torch.nn.Module, seed: int = 0) -> None:
    """Draw the weights, and biases, of every norm of queries and keys: so one in another's place is seen."""
    generator = torch.Generator().manual_seed(seed)
    for module in transformer.modules():
        for name in NORMS:
            norm = getattr(module, name, None)
            for parameter, (low, high) in RANGES.items():
                values = getattr(norm, parameter, None)
                if values is not None:
                    values.data.uniform_(low, high, generator=generator)
