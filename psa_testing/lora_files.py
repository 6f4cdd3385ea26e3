"""LoRA files for tiny Wan transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

RANK, WIDTH, LAYERS = 4, 64, 2


def lora_weights(seed: int = 0, layers: int = LAYERS, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Random factors for the queries and the output of every self-attention, by diffusers' names."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        for linear in ("to_q", "to_out.0"):
            name = f"transformer.blocks.{layer}.attn1.{linear}"
            found[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=draw) / 4
            found[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=draw) / 4
    return found


def save_lora(path: Path, weights: dict[str, torch.Tensor] | None = None, **settings: int) -> Path:
    """Write weights, or those of `lora_weights(**settings)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_weights(**settings) if weights is None else weights, path, metadata={"format": "pt"})
    return path
