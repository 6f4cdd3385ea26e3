"""HunyuanVideo 1.5: dual-stream blocks only; text, glyphs and an image's tokens after the video."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from psa_diffusers.families.family import AttentionCall
from psa_diffusers.families.hunyuan_video import CARD, HunyuanVideo
from psa_diffusers.families.parts import text_only_mask
from psa_diffusers.families.pipeline_kind import PipelineKind

if TYPE_CHECKING:
    import torch


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo15Transformer3DModel: text and image to video; the model sorts padding to the end itself."""

    name = "HunyuanVideo 1.5"
    order = 40
    transformers = ("HunyuanVideo15Transformer3DModel",)
    processors = ("HunyuanVideo15AttnProcessor2_0",)

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        return text_only_mask(call)


PIPELINES = {
    "HunyuanVideo15Pipeline": PipelineKind(
        layers=(("num_layers", 54),), compression=(4, 16), patch=1, tiled_vae=True, guider=True
    ),
}
_720P = replace(
    CARD,
    name="hunyuanvideo-1.5-720p",
    hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    about="HunyuanVideo 1.5 text to video, 8B, 720p",
    pipeline="HunyuanVideo15Pipeline",
    frames=121,
)
CARDS = (
    replace(
        _720P,
        name="hunyuanvideo-1.5-480p",
        hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        about="HunyuanVideo 1.5 text to video, 8B, 480 x 848",
        height=480,
        width=848,
    ),
    _720P,
)
