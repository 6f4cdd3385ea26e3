"""Motif-Video: HunyuanVideo's joint attention, and decoder blocks that attend two videos and no text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, DenseOnlyError
from psa_diffusers.families.hunyuan_video import HunyuanVideo, masks_text
from psa_diffusers.families.parts import concatenate, normalise, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import rotate_tokens

if TYPE_CHECKING:
    import torch


# What `AttentionCall.more` is in a decoder block; elsewhere it is the order in which the text comes.
TWO_VIDEOS = "two videos"


class MotifVideo(HunyuanVideo):
    """MotifVideoTransformer3DModel: text and image to video. The blocks' extra attention to text is left alone.

    The last single-stream blocks are a decoder: its own video tokens stand where others have them, and the encoder's
    video tokens, which have no positions, stand where others have text.
    """

    name = "Motif-Video"
    order = 90
    transformers = ("MotifVideoTransformer3DModel",)
    processors = ("MotifVideoAttnProcessor2_0",)
    arguments = (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "image_rotary_emb",
        "image_embed_seq_len",
    )
    several_videos = True

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        grid = HunyuanVideo.token_grid(transformer, inputs)
        if inputs.get("encoder_attention_mask") is None:
            image, text = inputs.get("image_embeds"), inputs.get("encoder_hidden_states")
            tokens = sum(0 if each is None else each.shape[1] for each in (image, text))
            if tokens == math.prod(grid):
                raise DenseOnlyError(
                    f"without an attention mask, its {tokens} text tokens look like as many video tokens"
                )
        return grid

    @classmethod
    def call(cls, arguments: Mapping[str, Any]) -> AttentionCall:
        video, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        call = AttentionCall(video, text, arguments.get("attention_mask"), arguments.get("image_rotary_emb"))
        if call.attention_mask is None and text.shape == video.shape:
            return replace(call, hidden_states=concatenate(video, text), encoder_hidden_states=None, more=TWO_VIDEOS)
        if not masks_text(call):
            return call
        real = arguments["attention_mask"][:, 0, 0, video.shape[1] :]
        order = real.int().argsort(dim=1, descending=True, stable=True)
        return replace(call, encoder_hidden_states=_in_order(text, order), more=order)

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        """Real text comes first, whichever side of it is padded, and however many tokens of an image precede it."""
        mask = HunyuanVideo.text_mask(call)
        return None if mask is None else mask.int().sort(1, descending=True).values.bool()

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if call.more is not TWO_VIDEOS:
            return HunyuanVideo.project(attn, call)
        x = call.hidden_states
        query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
        query, key = normalise(attn.norm_q, query), normalise(attn.norm_k, key)
        # The first of two videos has positions, and the other has none.
        query, key = (rotate_tokens(call.rotary_emb, part, after=x.shape[1] // 2) for part in (query, key))
        return query, key, value

    @staticmethod
    def output(
        attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if call.more is TWO_VIDEOS:
            decoder, encoder = video.flatten(2).chunk(2, dim=1)
            return decoder, encoder
        hidden, text = HunyuanVideo.output(attn, call, video, text)
        return hidden, text if text is None or call.more is None else _in_order(text, call.more.argsort(1))

    @staticmethod
    def parallel_plan(transformer: Any) -> None:
        # The decoder begins with a copy of what goes into the first block, which no plan would split.
        return None


def _in_order(text: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The tokens of `[B, T, C]` in another order `[B, T]`."""
    return text.gather(1, order[..., None].expand_as(text))


_KIND = PipelineKind(layers=(("num_layers", 20), ("num_single_layers", 40)), guider=True)
PIPELINES = {
    "MotifVideoPipeline": _KIND,
    "MotifVideoImage2VideoPipeline": replace(_KIND, image="first"),
}
_CARD = ModelCard(
    name="motif-video",
    hub_id="Motif-Technologies/Motif-Video-2B",
    about="Motif-Video text to video, 2B, 736 x 1280 at 24 fps",
    pipeline="MotifVideoPipeline",
    height=736,
    width=1280,
    frames=121,
    steps=50,
    guidance=8.0,
    fps=24,
    negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
)
CARDS = (
    _CARD,
    replace(
        _CARD,
        name="motif-video-i2v",
        about="Motif-Video image to video, 2B, 736 x 1280 at 24 fps (the same weights)",
        pipeline="MotifVideoImage2VideoPipeline",
    ),
)
