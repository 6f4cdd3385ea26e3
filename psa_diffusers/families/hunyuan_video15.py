"""HunyuanVideo 1.5: dual-stream blocks only; text, glyphs and an image's tokens after the video."""

from __future__ import annotations

import torch

from psa_diffusers.families.family import AttentionCall
from psa_diffusers.families.hunyuan_video import HunyuanVideo
from psa_diffusers.families.parts import text_only_mask


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo15Transformer3DModel: text and image to video; the model sorts padding to the end itself."""

    name = "HunyuanVideo 1.5"
    transformers = ("HunyuanVideo15Transformer3DModel",)

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        return text_only_mask(call)
