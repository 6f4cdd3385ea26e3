"""HunyuanVideo 1.5: dual-stream blocks only; text, glyphs and an image's tokens after the video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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


def _size_of(vae: Mapping[str, Any], transformer: Mapping[str, Any], height: int, width: int) -> tuple[int, int]:
    """The size of the video that its pipeline makes of an image: the nearest shape of the area that it was made for."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    sizes = HunyuanVideo15ImageProcessor(vae_scale_factor=vae.get("spatial_compression_ratio") or 16)
    return sizes.calculate_default_height_width(height, width, transformer.get("target_size", 640))


_KIND = PipelineKind(layers=(("num_layers", 54),), compression=(4, 16), patch=1, tiled_vae=True, guider=True)
PIPELINES = {
    "HunyuanVideo15Pipeline": _KIND,
    "HunyuanVideo15ImageToVideoPipeline": replace(_KIND, image="first", image_size=_size_of),
}
_720P = replace(
    CARD,
    name="hunyuanvideo-1.5-720p",
    hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
    about="HunyuanVideo 1.5 text to video, 8B, 720p",
    pipeline="HunyuanVideo15Pipeline",
    frames=121,
)
_480P = replace(
    _720P,
    name="hunyuanvideo-1.5-480p",
    hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    about="HunyuanVideo 1.5 text to video, 8B, 480 x 848",
    height=480,
    width=848,
)
_I2V = "HunyuanVideo15ImageToVideoPipeline"
CARDS = (
    _480P,
    _720P,
    replace(
        _480P,
        name="hunyuanvideo-1.5-i2v-480p",
        hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
        about="HunyuanVideo 1.5 image to video, 8B, 480 x 848 or of that area, as the image is",
        pipeline=_I2V,
    ),
    replace(
        _720P,
        name="hunyuanvideo-1.5-i2v-720p",
        hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v",
        about="HunyuanVideo 1.5 image to video, 8B, 720p or of that area, as the image is",
        pipeline=_I2V,
    ),
)
