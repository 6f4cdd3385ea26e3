"""Allegro: video tokens attend each other alone; each third of a head's channels is rotated by one coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import first_attentions, project_out, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind

if TYPE_CHECKING:
    import torch


class Allegro(ModelFamily):
    """AllegroTransformer3DModel. It has no `set_attn_processor`: `apply_psa` patches it."""

    name = "Allegro"
    order = 90
    transformers = ("AllegroTransformer3DModel",)
    processors = ("AllegroAttnProcessor2_0",)

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, height, width = inputs["hidden_states"].shape[2:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        return frames // patch_t, height // patch, width // patch

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
        if call.rotary_emb is not None:
            query, key = (_rotate(x, *call.rotary_emb) for x in (query, key))
        return query, key, value

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)


def _rotate(
    x: torch.Tensor, tables: tuple[tuple[torch.Tensor, torch.Tensor], ...], positions: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Rotate `[B, N, H, D]`, in each third of the channels its first half against its second.

    Args:
        tables: for frame, row and column: cosines and sines `[positions, D / 3]`.
        positions: for each of them the coordinate of every token, `[B, N]`.
    """
    import torch
    import torch.nn.functional as F

    rotated = []
    for part, (cos, sin), position in zip(x.chunk(3, dim=-1), tables, positions, strict=True):
        first, second = part.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        cos, sin = (F.embedding(position, table)[:, :, None] for table in (cos, sin))
        rotated.append((part * cos + turned * sin).to(x.dtype))
    return torch.cat(rotated, dim=-1)


PIPELINES = {
    "AllegroPipeline": PipelineKind(
        layers=(("num_layers", 32),), frame_rest=0, tiled_vae=True, exact_vae="AutoencoderKLAllegro"
    ),
}
CARDS = (
    ModelCard(
        name="allegro",
        hub_id="rhymes-ai/Allegro",
        about="Allegro text to video, 3B, 720p at 15 fps",
        pipeline="AllegroPipeline",
        height=720,
        width=1280,
        frames=88,
        steps=100,
        guidance=7.5,
        fps=15,
        negative_prompt="",
    ),
)
