"""Kandinsky 6: video with sound; video tokens attend each other alone, and those of the audio in attention apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.kandinsky5 import NEGATIVE_PROMPT, patched_grid, project_heads, rotate
from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput

if TYPE_CHECKING:
    import torch


class Kandinsky6(ModelFamily):
    """Kandinsky6Transformer3DModel: text and image to video and audio. Audio, text and what joins them are left alone.

    An image is a frame of the grid, the last one.
    """

    name = "Kandinsky 6"
    transformers = ("Kandinsky6Transformer3DModel",)
    processors = ("Kandinsky6AttnProcessor",)
    arguments = ("hidden_states", "encoder_hidden_states", "rotary_emb", "rotary_emb_kv", "attn_mask")

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        blocks = enumerate(transformer.visual_transformer_blocks)
        return {f"visual_transformer_blocks.{index}": block.video_dec_block.self_attention for index, block in blocks}

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        return patched_grid(transformer, inputs)

    @classmethod
    def call(cls, arguments: Mapping[str, Any]) -> AttentionCall:
        return AttentionCall(
            arguments["hidden_states"],
            attention_mask=arguments.get("attn_mask"),
            rotary_emb=(arguments.get("rotary_emb"), arguments.get("rotary_emb_kv")),
        )

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = project_heads(attn, call.hidden_states)
        query, key = attn.query_norm(query), attn.key_norm(key)
        of_queries, of_keys = call.rotary_emb or (None, None)
        if of_queries is not None:
            query = rotate(query, of_queries).type_as(query)
        if of_keys is not None:
            key = rotate(key, of_keys).type_as(key)
        return query, key, value

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return attn.out_layer(video.flatten(2))


PIPELINES = {
    "Kandinsky6TI2VAPipeline": PipelineKind(
        image="first or none",
        image_latents=1,
        layers=(("num_visual_blocks", 60),),
        tiled_vae=True,
        sound=SoundOutput("audio_sample_rate"),
        frame_rate="frame_rate",
    ),
}
_CARD = ModelCard(
    name="kandinsky6",
    hub_id="kandinskylab/Kandinsky-6.0-Pro-sft-5s-Diffusers",
    about="Kandinsky 6 Pro text to video and audio, 29B, 480 x 864 at 24 fps",
    pipeline="Kandinsky6TI2VAPipeline",
    height=480,
    width=864,
    frames=121,
    steps=50,
    guidance=5.0,
    fps=24,
    negative_prompt=NEGATIVE_PROMPT,
)
CARDS = (
    _CARD,
    replace(
        _CARD,
        name="kandinsky6-distilled",
        hub_id="kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
        about="Kandinsky 6 Pro text to video and audio, 29B, 480 x 864 at 24 fps, in 16 steps without guidance",
        steps=16,
        guidance=1.0,
    ),
)
