"""SkyReels V2: Wan's architecture; diffusion forcing in causal blocks gives its layers a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, DenseOnlyError
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.wan import Wan

if TYPE_CHECKING:
    import torch


class SkyReelsV2(Wan):
    """SkyReelsV2Transformer3DModel: text and image to video, and diffusion forcing, which is dense in causal blocks."""

    name = "SkyReels V2"
    order = 70
    transformers = ("SkyReelsV2Transformer3DModel",)
    processors = ("SkyReelsV2AttnProcessor",)

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        if call.attention_mask is not None:
            raise DenseOnlyError("diffusion forcing in causal blocks masks the attention between frames")
        return None


_KIND = PipelineKind(exact_vae="AutoencoderKLWan")
PIPELINES = {"SkyReelsV2Pipeline": _KIND, "SkyReelsV2ImageToVideoPipeline": replace(_KIND, image="first")}
_CARD = ModelCard(
    name="skyreels-v2",
    hub_id="Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
    about="SkyReels V2 text to video, 14B, 544 x 960 at 24 fps",
    pipeline="SkyReelsV2Pipeline",
    height=544,
    width=960,
    frames=97,
    steps=50,
    guidance=6.0,
    flow_shift=8.0,
    fps=24,
    negative_prompt="",
)
CARDS = (
    _CARD,
    replace(
        _CARD,
        name="skyreels-v2-i2v",
        hub_id="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
        about="SkyReels V2 image to video, 14B, 544 x 960 at 24 fps",
        pipeline="SkyReelsV2ImageToVideoPipeline",
        guidance=5.0,
        flow_shift=5.0,
    ),
)
