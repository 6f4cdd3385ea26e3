"""Tiny random LTX-Video pipelines: 2 layers, 2 heads of 16, a VAE of 4 x 4 x 4."""

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)

from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer


def _parts(heads: int = 2) -> dict:
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
