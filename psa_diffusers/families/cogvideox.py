"""CogVideoX: joint attention of text and, after it, video; with or without rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import (
    concatenate,
    first_attentions,
    normalise,
    one_by_one,
    project_out,
    split_heads,
)
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import rotate_tokens

if TYPE_CHECKING:
    import torch


class CogVideoX(ModelFamily):
    """CogVideoXTransformer3DModel: CogVideoX 2B, 5B and 1.5, text, image and video to video.

    The model masks no text: its text encoder's padding is attended as in diffusers.
    """

    name = "CogVideoX"
    order = 30
    transformers = ("CogVideoXTransformer3DModel",)
    processors = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")
    text = "before"

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, height, width = inputs["hidden_states"].shape[1:]
        patch, patch_t = transformer.config.patch_size, transformer.config.get("patch_size_t") or 1
        return -(-frames // patch_t), height // patch, width // patch

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Fusing leaves the three projections in place and adds a copy; the copy knows no LoRA.
        assert call.encoder_hidden_states is not None, "its attention is always joint"
        x = concatenate(call.encoder_hidden_states, call.hidden_states)

        def placed(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = normalise(norm, split_heads(attn, x)[0])
            return rotate_tokens(call.rotary_emb, x, before=call.text_tokens)

        return one_by_one(
            call,
            lambda: placed(attn.to_q(x), attn.norm_q),
            lambda: placed(attn.to_k(x), attn.norm_k),
            lambda: split_heads(attn, attn.to_v(x))[0],
        )

    @staticmethod
    def output(
        attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert text is not None, "its attention is always joint"
        return project_out(attn, video), project_out(attn, text)

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any]:
        tables = split(0, 2)
        return {
            "": {"image_rotary_emb": [tables, tables]},
            "transformer_blocks.0": {"hidden_states": split(1, 3)},
            "proj_out": gather(1, 3),
        }


_KIND = PipelineKind(layers=(("num_layers", 30),), tiled_vae=True)
PIPELINES = {
    "CogVideoXPipeline": _KIND,
    "CogVideoXImageToVideoPipeline": replace(_KIND, image="first"),
}
_CARD = ModelCard(
    name="cogvideox-5b",
    hub_id="zai-org/CogVideoX-5b",
    about="CogVideoX text to video, 5B, 480 x 720 at 8 fps",
    pipeline="CogVideoXPipeline",
    height=480,
    width=720,
    frames=49,
    steps=50,
    guidance=6.0,
    fps=8,
    negative_prompt="",
)
_CARD_1_5 = replace(
    _CARD,
    name="cogvideox1.5-5b",
    hub_id="zai-org/CogVideoX1.5-5B",
    about="CogVideoX 1.5 text to video, 5B, 768 x 1360 at 16 fps",
    height=768,
    width=1360,
    frames=81,
    fps=16,
)
CARDS = (
    replace(
        _CARD,
        name="cogvideox-2b",
        hub_id="zai-org/CogVideoX-2b",
        about="CogVideoX text to video, 2B, 480 x 720 at 8 fps",
        dtype="float16",
    ),
    _CARD,
    replace(
        _CARD,
        name="cogvideox-5b-i2v",
        hub_id="zai-org/CogVideoX-5b-I2V",
        about="CogVideoX image to video, 5B, 480 x 720 at 8 fps and no other size",
        pipeline="CogVideoXImageToVideoPipeline",
    ),
    _CARD_1_5,
    replace(
        _CARD_1_5,
        name="cogvideox1.5-5b-i2v",
        hub_id="zai-org/CogVideoX1.5-5B-I2V",
        about="CogVideoX 1.5 image to video, 5B, 768 x 1360 at 16 fps",
        pipeline="CogVideoXImageToVideoPipeline",
    ),
)
