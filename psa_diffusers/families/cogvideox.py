"""CogVideoX: joint attention of text and, after it, video; with or without rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import first_attentions, normalise, project_out, rotate_tokens, split_heads


class CogVideoX(ModelFamily):
    """CogVideoXTransformer3DModel: CogVideoX 2B, 5B and 1.5, text, image and video to video.

    The model masks no text: its text encoder's padding is attended as in diffusers.
    """

    name = "CogVideoX"
    transformers = ("CogVideoXTransformer3DModel",)
    text = "before"

    @staticmethod
    def self_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
        return -(-frames // patch_t), height // patch, width // patch

    @staticmethod
    def project(attn: torch.nn.Module, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Fusing leaves the three projections in place and adds a copy; the copy knows no LoRA.
        x = torch.cat([call.encoder_hidden_states, call.hidden_states], dim=1)
        query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
        query, key = normalise(attn.norm_q, query), normalise(attn.norm_k, key)
        if call.rotary_emb is not None:
            text = call.text_tokens
            query, key = (
                torch.cat([x[:, :text], rotate_tokens(x[:, text:], call.rotary_emb)], dim=1) for x in (query, key)
            )
        return query, key, value

    @staticmethod
    def output(
        attn: torch.nn.Module, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return project_out(attn, video), project_out(attn, text)

    @staticmethod
    def parallel_plan(transformer: torch.nn.Module) -> dict[str, Any]:
        tables = split(0, 2)
        return {
            "": {"image_rotary_emb": [tables, tables]},
            "transformer_blocks.0": {"hidden_states": split(1, 3)},
            "proj_out": gather(1, 3),
        }
