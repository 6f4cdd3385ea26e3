"""HunyuanVideo Framepack: a tiny random pipeline, and the published transformer.

Its configuration is the one that `load_packed_model` of kohya-ss/musubi-tuner
(src/musubi_tuner/frame_pack/hunyuan_video_packed.py, 0382db2) writes out, and loads the published weights into; it is
that of the class's defaults but for two keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from psa_diffusers.families.framepack import Framepack
from psa_testing.cases import IMAGE, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.families import hunyuan_video
from psa_testing.full_size import Inputs, Latents, Network, Noise

HISTORY = (1, 2, 16)  # frames at full, half and quarter scale


def tiny_framepack() -> HunyuanVideoFramepackPipeline:
    """Next-section prediction: every section of the video is a denoising run of its own, after earlier frames."""
    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **hunyuan_video.TRANSFORMER,
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=15
    )
    return HunyuanVideoFramepackPipeline(
        **hunyuan_video.parts(transformer),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 30, "width": 30}),
    )


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    _, channels, frames, height, width = latents
    prefix, own, *history = torch.arange(1 + frames + sum(HISTORY)).split([1, frames, *HISTORY])
    return {
        **hunyuan_video.inputs(config, latents, noise),
        "image_embeds": noise(1, noise.tokens(729), config.image_proj_dim),
        "indices_latents": own,
        "latents_clean": noise(1, channels, 1 + HISTORY[0], height, width),
        "indices_latents_clean": torch.cat([prefix, history[0]]),
        "latents_history_2x": noise(1, channels, HISTORY[1], height, width),
        "indices_latents_history_2x": history[1],
        "latents_history_4x": noise(1, channels, HISTORY[2], height, width),
        "indices_latents_history_4x": history[2],
    }


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**hunyuan_video.toy(config), "image_proj_dim": 32}


TESTS = FamilyTests(
    family=Framepack,
    cases={
        "framepack": Case(
            tiny_framepack,
            {**hunyuan_video.GUIDED, "image": IMAGE, "latent_window_size": 3, "num_inference_steps": 3},
            ({"true_cfg_scale": 1.0, "guidance_scale": 4.0, "height": 96, "width": 160},),
            one_each=True,
        ),
    },
    networks={
        "HunyuanVideoFramepackTransformer3DModel": Network(
            _inputs, _toy, one_block=hunyuan_video.ONE_BLOCK, kinds=2, reads_masks=True
        ),
    },
    published=(
        # A section of 9 latent frames of 832 x 480 pixels; the tokens of earlier frames before it are not in the grid.
        # Its text: 729 tokens of the image, and up to 256 of the prompt.
        replace(
            hunyuan_video.T2V,
            checkpoint="lllyasviel/FramePackI2V_HY",
            model="HunyuanVideoFramepackTransformer3DModel",
            config={
                **hunyuan_video.T2V.config,
                "has_image_proj": True,
                "image_proj_dim": 1152,
                "has_clean_x_embedder": True,
            },
            latents=(1, 16, 9, 104, 60),
            grid=(9, 52, 30),
            text=729 + 256,
        ),
    ),
    saved={"framepack-i2v": SavedCase(tiny_framepack, size=64, frames=9)},
    masks_padding=True,
    has_set_attn_processor=False,
)
