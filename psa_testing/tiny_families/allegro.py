"""A tiny random Allegro pipeline: 2 layers, 2 heads of 12."""

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer


def tiny_allegro() -> AllegroPipeline:
    """Text to video."""
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=16,
        sample_height=16,
        sample_frames=3,
        caption_channels=32,
    ).eval()
    vae = AutoencoderKLAllegro(
        in_channels=3,
        out_channels=3,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return AllegroPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=DDIMScheduler(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
    )
