"""LTX-Video: video tokens attend each other alone; its latents come as a sequence of tokens already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from psa_diffusers.models.family import AttentionCall, ModelFamily
from psa_diffusers.models.parts import project_out, rotate_pairs, split_heads


class LTXVideo(ModelFamily):
    """LTXVideoTransformer3DModel: text and image to video."""

    name = "LTX-Video"
    transformers = ("LTXVideoTransformer3DModel",)

    @staticmethod
    def self_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        return {
            f"transformer_blocks.{index}": block.attn1 for index, block in enumerate(transformer.transformer_blocks)
        }

    @staticmethod
    def token_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
        # Pipelines with conditions or long videos give coordinates of tokens that need not form a grid.
        if None in sizes or inputs.get("video_coords") is not None:
            return None
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        frames, height, width = sizes
        return frames // patch_t, height // patch, width // patch

    @staticmethod
    def project(attn: torch.nn.Module, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        if call.rotary_emb is not None:
            # The tables `[B, N, H * D]` hold each angle twice; positions run through all heads.
            cos, sin = (table[..., ::2] for table in call.rotary_emb)
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        query, key, value = split_heads(attn, query, key, value)
        return query, key, value

    @staticmethod
    def output(attn: torch.nn.Module, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)
