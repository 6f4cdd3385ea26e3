"""Wan 2.1 and 2.2: video tokens attend each other alone; text and images have cross-attention of their own."""

from __future__ import annotations

import torch

from psa_diffusers.models.family import ModelFamily


class Wan(ModelFamily):
    """WanTransformer3DModel: text, image and video to video; Wan 2.2's two experts are two such transformers."""

    name = "Wan 2.1 and 2.2"
    transformers = ("WanTransformer3DModel",)

    @staticmethod
    def self_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        return {f"blocks.{index}": block.attn1 for index, block in enumerate(transformer.blocks)}

    @staticmethod
    def token_grid(transformer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        frames, height, width = (
            size // patch for size, patch in zip(hidden_states.shape[2:], transformer.config.patch_size, strict=True)
        )
        return frames, height, width

    @staticmethod
    def project(
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # The modules are called, never their weights read: LoRA, casting, offload and quantisation live in the calls.
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        return query, key, value

    @staticmethod
    def output(attn: torch.nn.Module, attended: torch.Tensor) -> torch.Tensor:
        linear, dropout = attn.to_out
        return dropout(linear(attended.flatten(2)))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels of `[B, N, H, D]`; the tables `[1, N, 1, D]` hold each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
