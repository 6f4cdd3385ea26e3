"""LTX-Video: tiny random pipelines with 2 layers, 2 heads of 16 and a VAE of 4 x 4 x 4, and the published transformers.

Their configurations are those of `scripts/convert_ltx_to_diffusers.py` of diffusers (58eb52c), which for 0.9 equals
Lightricks/LTX-Video's transformer/config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

from psa_diffusers.families.ltx import LTXVideo
from psa_testing.cases import GUIDED, SMALL_TEXT, TWO_PROMPTS, Case, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import TOY_TOKENS, Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_image, tiny_text_encoder, tiny_tokenizer


def _parts(heads: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=heads,
        attention_head_dim=16,
        cross_attention_dim=16 * heads,
        num_layers=2,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    ).eval()
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
    }


def tiny_ltx(heads: int = 2) -> LTXPipeline:
    """Text to video."""
    return LTXPipeline(**_parts(heads))


def tiny_ltx_i2v(heads: int = 2) -> LTXImageToVideoPipeline:
    """Image to video: the first frame's tokens have timestep 0."""
    return LTXImageToVideoPipeline(**_parts(heads))


def tiny_ltx_condition() -> LTXConditionPipeline:
    """Video with conditions: tokens have coordinates, and need not form a grid."""
    return LTXConditionPipeline(**_parts())


def _with_one_processor() -> LTXImageToVideoPipeline:
    """A pipeline all of whose attention modules have the same processor."""
    pipe = tiny_ltx_i2v(heads=4)
    pipe.transformer.set_attn_processor(LTXVideoAttnProcessor())
    return pipe


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    # 25 frames a second, of which 8 are one latent frame of 32 x 32 pixels.
    return {**noise.padded_text(128, config.caption_channels), "rope_interpolation_scale": (8 / 25, 32, 32)}


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "cross_attention_dim": 32,
        "caption_channels": 32,
    }


_2B = Published(
    "Lightricks/LTX-Video",
    "LTXVideoTransformer3DModel",
    {
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
    },
    latents=(1, 6930, 128),
    layers=28,
    heads=32,
    head_dim=64,
    grid=(21, 15, 22),
    inputs={"num_frames": 21, "height": 15, "width": 22},
    toy=True,
)
_13B = replace(
    _2B,
    checkpoint="Lightricks/LTX-Video-0.9.7-dev",
    config={
        **_2B.config,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "num_layers": 48,
    },
    layers=48,
    head_dim=128,
    toy=False,
)
_RUN: Inputs = {**GUIDED, **SMALL_TEXT, "height": 32, "width": 32}
_WITH_IMAGE: Inputs = {**_RUN, "image": tiny_image(32, 32)}
_CONDITION = Case(
    tiny_ltx_condition,
    {**_WITH_IMAGE, "strength": 1.0},
    ({"image": None}, {"frame_index": 8, "height": 64, "num_frames": 17}),
)

TESTS = FamilyTests(
    family=LTXVideo,
    cases={
        "ltx": Case(
            tiny_ltx,
            _RUN,
            ({"height": 64, "width": 32}, {"num_frames": 17}, {**TWO_PROMPTS, "num_videos_per_prompt": 2}),
            one_each=True,
            fuses=True,
        ),
        "ltx-i2v": Case(tiny_ltx_i2v, _WITH_IMAGE),
        "ltx-condition": _CONDITION,
    },
    networks={
        "LTXVideoTransformer3DModel": Network(
            _inputs,
            _toy,
            toy_latents=lambda published: (1, 192, published.latents[2]),
            toy_sizes=dict(zip(("num_frames", "height", "width"), TOY_TOKENS, strict=True)),
        ),
    },
    published=(_2B, _13B),
    parallel={
        "ltx": ParallelCase(Case(lambda: tiny_ltx(heads=4), _RUN), (Ranks(2, inputs=TWO_PROMPTS),)),
        "ltx-i2v": ParallelCase(Case(_with_one_processor, _WITH_IMAGE), (Ranks(2, "patch"),)),
        "ltx-condition": ParallelCase(_CONDITION, (Ranks(2),)),
    },
    saved={"ltx-i2v": SavedCase(tiny_ltx_i2v, size=32, frames=9)},
    masks_padding=True,
)
