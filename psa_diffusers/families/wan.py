"""Wan 2.1 and 2.2: video tokens attend each other alone; text and images have cross-attention of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import project_out, rotate_pairs, split_heads


class Wan(ModelFamily):
    """Text, image and video to video, VACE and Animate; Wan 2.2's two experts are two transformers."""

    name = "Wan 2.1 and 2.2"
    transformers = ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel")

    @staticmethod
    def self_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        # VACE's control blocks run first, but are named last: so a preset's layer numbers mean the same blocks as in
        # the model without them.
        groups = [name for name in ("blocks", "vace_blocks") if hasattr(transformer, name)]
        blocks = (
            (f"{name}.{index}", block) for name in groups for index, block in enumerate(getattr(transformer, name))
        )
        return {name: block.attn1 for name, block in blocks}

    @staticmethod
    def token_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        sizes = inputs["hidden_states"].shape[2:]
        frames, height, width = (
            size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)
        )
        return frames, height, width

    @staticmethod
    def project(attn: torch.nn.Module, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        query, key, value = split_heads(attn, attn.norm_q(query), attn.norm_k(key), value)
        if call.rotary_emb is not None:
            # The tables `[1, N, 1, D]` hold each angle twice.
            cos, sin = call.rotary_emb
            cos, sin = cos[..., 0::2], sin[..., 1::2]
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        return query, key, value

    @staticmethod
    def output(attn: torch.nn.Module, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)
