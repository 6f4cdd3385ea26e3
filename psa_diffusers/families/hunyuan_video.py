"""HunyuanVideo: joint attention of video and, after it, text; dual-stream blocks first, then single-stream blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.families.parts import (
    concatenate,
    normalise,
    one_by_one,
    project_added,
    project_out,
    split_heads,
)
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import rotate_tokens

if TYPE_CHECKING:
    import torch


class HunyuanVideo(ModelFamily):
    """HunyuanVideoTransformer3DModel: text and image to video. The text's token refiner is left alone."""

    name = "HunyuanVideo"
    order = 20
    transformers = ("HunyuanVideoTransformer3DModel",)
    processors = ("HunyuanVideoAttnProcessor2_0",)
    text = "after"

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        groups = ("transformer_blocks", "single_transformer_blocks")
        blocks = {name: getattr(transformer, name, ()) for name in groups}
        return {f"{name}.{index}": block.attn for name in groups for index, block in enumerate(blocks[name])}

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, height, width = inputs["hidden_states"].shape[2:]
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        return frames // patch_t, height // patch, width // patch

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        video, text = call.hidden_states, call.encoder_hidden_states
        # A single-stream block projects text with the video, but does not rotate it.
        x = video if text is None or attn.add_q_proj is not None else concatenate(video, text)
        single = x is not video
        of_text = None if single or text is None else project_added(attn, text)

        def joined(x: torch.Tensor, part: int) -> torch.Tensor:
            return x if of_text is None else concatenate(x, of_text[part])

        def placed(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = normalise(norm, split_heads(attn, x)[0])
            return rotate_tokens(call.rotary_emb, x, after=call.text_tokens if single else 0)

        return one_by_one(
            call,
            lambda: joined(placed(attn.to_q(x), attn.norm_q), 0),
            lambda: joined(placed(attn.to_k(x), attn.norm_k), 1),
            lambda: joined(split_heads(attn, attn.to_v(x))[0], 2),
        )

    @staticmethod
    def output(
        attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # The last projection of a single-stream block is outside its attention.
        hidden = project_out(attn, video) if getattr(attn, "to_out", None) is not None else video.flatten(2)
        if text is not None:
            text = text.flatten(2)
            if getattr(attn, "to_add_out", None) is not None:
                text = attn.to_add_out(text)
        return hidden, text

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        """The model masks keys, `[B, 1, 1, N + T]`, and there only the text's padding."""
        mask = call.attention_mask
        if mask is None:
            return None
        if not masks_text(call):
            raise DenseOnlyError(f"its attention mask is {mask.dtype} {tuple(mask.shape)}, not one of text padding")
        return mask[:, 0, 0, call.hidden_states.shape[1] :]

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any] | None:
        if _treats_first_frame_apart(transformer):
            return None
        tables = split(0, 2, output=True)
        return {
            "rope": {0: tables, 1: tables},
            "transformer_blocks.0": {"hidden_states": split(1, 3)},
            "proj_out": gather(1, 3),
        }


def masks_text(call: AttentionCall) -> bool:
    """Whether a call has a mask of keys, bool `[B, 1, 1, N + T]`."""
    import torch

    batch, tokens = call.hidden_states.shape[:2]
    mask = call.attention_mask
    return mask is not None and mask.dtype == torch.bool and mask.shape == (batch, 1, 1, tokens + call.text_tokens)


def _treats_first_frame_apart(transformer: Any) -> bool:
    """Whether blocks know the tokens of the first frame as the first ones, as in one kind of image to video."""
    return getattr(transformer.config, "image_condition_type", None) == "token_replace"


TEXT_TO_VIDEO = PipelineKind(layers=(("num_layers", 20), ("num_single_layers", 40)), tiled_vae=True)
PIPELINES = {
    "HunyuanVideoPipeline": TEXT_TO_VIDEO,
    "HunyuanVideoImageToVideoPipeline": replace(TEXT_TO_VIDEO, image="first"),
}
CARD = ModelCard(
    name="hunyuanvideo",
    hub_id="hunyuanvideo-community/HunyuanVideo",
    about="HunyuanVideo text to video, 13B, 720p; its guidance is distilled",
    pipeline="HunyuanVideoPipeline",
    height=720,
    width=1280,
    frames=129,
    steps=50,
    guidance=6.0,
    fps=24,
    negative_prompt="",
)
CARDS = (
    CARD,
    replace(
        CARD,
        name="hunyuanvideo-i2v",
        hub_id="hunyuanvideo-community/HunyuanVideo-I2V",
        about="HunyuanVideo image to video, 13B, 720p; its guidance is distilled",
        pipeline="HunyuanVideoImageToVideoPipeline",
    ),
)
