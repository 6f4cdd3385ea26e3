"""A tiny random Mochi pipeline: 2 layers, 2 heads of 16; the last layer has no output for text."""

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer


def tiny_mochi(heads: int = 2) -> MochiPipeline:
    """Text to video."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()
    # Trained values; the model itself starts with uninitialised ones.
    transformer.pos_frequencies.data = torch.randn(transformer.pos_frequencies.shape)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return MochiPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
    )
