"""SkyReels V2: Wan's architecture; diffusion forcing in causal blocks gives its layers a mask."""

from __future__ import annotations

import torch

from psa_diffusers.families.family import AttentionCall, DenseOnlyError
from psa_diffusers.families.wan import Wan


class SkyReelsV2(Wan):
    """SkyReelsV2Transformer3DModel: text and image to video, and diffusion forcing, which is dense in causal blocks."""

    name = "SkyReels V2"
    transformers = ("SkyReelsV2Transformer3DModel",)

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        if call.attention_mask is not None:
            raise DenseOnlyError("diffusion forcing in causal blocks masks the attention between frames")
        return None
