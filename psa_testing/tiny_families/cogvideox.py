"""Tiny random CogVideoX pipelines: 3 layers, 2 heads of 16."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 3,
    "sample_width": 16,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 16,
}
# The transformer of CogVideoX 1.5 takes patches of two latent frames.
VERSION_1_5 = {"patch_size_t": 2, "patch_bias": False, "sample_width": 24, "sample_height": 24}


def _parts(scheduler: type = CogVideoXDDIMScheduler, **config) -> dict:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**{**TRANSFORMER, **config}).eval()
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return {
        "tokenizer": tiny_tokenizer(226),
        "text_encoder": tiny_text_encoder(),
        "vae": vae,
        "transformer": transformer,
        "scheduler": scheduler(),
    }


def tiny_cogvideox_2b(**config) -> CogVideoXPipeline:
    """As CogVideoX 2B: added sinusoidal positions, DDIM."""
    return CogVideoXPipeline(**_parts(**config))


def tiny_cogvideox_5b(**config) -> CogVideoXPipeline:
    """As CogVideoX 5B: rotary positions, DPM."""
    return CogVideoXPipeline(**_parts(CogVideoXDPMScheduler, use_rotary_positional_embeddings=True, **config))


def tiny_cogvideox_1_5() -> CogVideoXPipeline:
    """As CogVideoX 1.5: rotary positions, two latent frames a patch."""
    return CogVideoXPipeline(**_parts(CogVideoXDPMScheduler, use_rotary_positional_embeddings=True, **VERSION_1_5))


def tiny_cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    """Image to video: as many channels again for the image."""
    return CogVideoXImageToVideoPipeline(**_parts(in_channels=8, use_rotary_positional_embeddings=True))
