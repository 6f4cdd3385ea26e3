"""AnyFlow: Wan's architecture with positions as complex numbers, made for runs of few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall
from psa_diffusers.families.parts import normalise, rotate_pairs, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.wan import Wan

if TYPE_CHECKING:
    import torch


class AnyFlow(Wan):
    """AnyFlowTransformer3DModel: text and video to video, without chunks."""

    name = "AnyFlow"
    order = 100
    transformers: ClassVar[tuple[str, ...]] = ("AnyFlowTransformer3DModel",)
    processors = ("AnyFlowAttnProcessor",)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        _, patch_height, patch_width = transformer.config.patch_size
        return frames, height // patch_height, width // patch_width

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        query, key = normalise(attn.norm_q, attn.to_q(x)), normalise(attn.norm_k, attn.to_k(x))
        query, key, value = split_heads(attn, query, key, attn.to_v(x))
        if call.rotary_emb is not None:
            query, key = _rotate(query, call.rotary_emb["query"]), _rotate(key, call.rotary_emb["key"])
        return query, key, value


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate `[B, N, H, D]` by a complex table `[1, 1, N, D / 2]`, in its precision; keeps the dtype."""
    import torch

    cos, sin = torch.view_as_real(table[:, 0, :, None]).unbind(-1)
    return rotate_pairs(x, cos, sin)


PIPELINES = {"AnyFlowPipeline": PipelineKind(exact_vae="AutoencoderKLWan")}
_CARD = ModelCard(
    name="anyflow",
    hub_id="nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",
    about="AnyFlow text to video, 1.3B, 480p, in 4 steps; its guidance is distilled",
    pipeline="AnyFlowPipeline",
    steps=4,
    guidance=1.0,
    negative_prompt="",
)
CARDS = (
    _CARD,
    replace(
        _CARD,
        name="anyflow-14b",
        hub_id="nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",
        about="AnyFlow text to video, 14B, 480p, in 4 steps; its guidance is distilled",
    ),
)
