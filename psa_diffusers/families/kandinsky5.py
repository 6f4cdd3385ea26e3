"""Kandinsky 5: video tokens attend each other alone; positions are matrices. Its own sparse attention is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.families.parts import rotate_pairs
from psa_diffusers.families.pipeline_kind import PipelineKind

if TYPE_CHECKING:
    import torch

OWN_SPARSE = "this forward has sparse attention of its own (NABLA), which stays as it is"


class Kandinsky5(ModelFamily):
    """Kandinsky5Transformer3DModel: text and image to video, and images. Its text blocks are left alone."""

    name = "Kandinsky 5"
    order = 90
    transformers = ("Kandinsky5Transformer3DModel",)
    processors = ("Kandinsky5AttnProcessor",)
    arguments = ("hidden_states", "encoder_hidden_states", "rotary_emb", "sparse_params")

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        blocks = enumerate(transformer.visual_transformer_blocks)
        return {f"visual_transformer_blocks.{index}": block.self_attention for index, block in blocks}

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        if inputs.get("sparse_params") is not None:
            # Its tokens stand in another order then, too.
            raise DenseOnlyError(OWN_SPARSE)
        return patched_grid(transformer, inputs)

    @staticmethod
    def always_dense(transformer: Any) -> str | None:
        return OWN_SPARSE if transformer.config.attention_type == "nabla" else None

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        query, key, value = project_heads(attn, call.hidden_states)
        # As the model was trained: norms and rotation in float32, and what is rotated is rounded to bfloat16.
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if call.rotary_emb is not None:
            query, key = (rotate(x, call.rotary_emb).to(torch.bfloat16).type_as(x) for x in (query, key))
        return query, key, value

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return attn.out_layer(video.flatten(2))


def patched_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
    """Frames, height and width of hidden states `[B, frames, height, width, C]` after patching."""
    sizes = inputs["hidden_states"].shape[1:4]
    frames, height, width = (size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True))
    return frames, height, width


def project_heads(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values `[B, N, H, D]`, neither normalised nor rotated."""
    linears = (attn.to_query, attn.to_key, attn.to_value)
    return tuple(linear(x).unflatten(-1, (attn.num_heads, -1)) for linear in linears)


def rotate(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Rotate `[B, N, H, D]` by matrices `[..., N, 1, D / 2, 2, 2]`, in float32 and not rounded."""
    return rotate_pairs(x.float(), matrices[..., 0, 0].float(), matrices[..., 1, 0].float())


NEGATIVE_PROMPT = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, "
    "walking backwards"
)
_KIND = PipelineKind(layers=(("num_visual_blocks", 32),), tiled_vae=True)
_IMAGES = replace(
    _KIND, in_code_only="it makes images, and this command makes videos; patch it in Python with apply_psa(pipe)"
)
PIPELINES = {
    "Kandinsky5T2VPipeline": _KIND,
    "Kandinsky5I2VPipeline": replace(_KIND, image="first"),
    "Kandinsky5T2IPipeline": _IMAGES,
    "Kandinsky5I2IPipeline": _IMAGES,
}
_CARD = ModelCard(
    name="kandinsky5-lite",
    hub_id="kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    about="Kandinsky 5 Lite text to video, 2B, 512 x 768 at 24 fps",
    pipeline="Kandinsky5T2VPipeline",
    height=512,
    width=768,
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
        name="kandinsky5-lite-nocfg",
        hub_id="kandinskylab/Kandinsky-5.0-T2V-Lite-nocfg-5s-Diffusers",
        about="Kandinsky 5 Lite text to video, 2B, 512 x 768 at 24 fps; its guidance is distilled",
        guidance=1.0,
    ),
    replace(
        _CARD,
        name="kandinsky5-lite-distilled",
        hub_id="kandinskylab/Kandinsky-5.0-T2V-Lite-distilled16steps-5s-Diffusers",
        about="Kandinsky 5 Lite text to video, 2B, 512 x 768 at 24 fps, in 16 steps without guidance",
        steps=16,
        guidance=1.0,
    ),
    replace(
        _CARD,
        name="kandinsky5-lite-i2v",
        hub_id="kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers",
        about="Kandinsky 5 Lite image to video, 2B, 512 x 768 at 24 fps",
        pipeline="Kandinsky5I2VPipeline",
    ),
)
