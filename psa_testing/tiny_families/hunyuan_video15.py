"""A tiny random HunyuanVideo 1.5 pipeline; its text encoders stay out, so a run gives embeddings and masks."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance

TEXT, GLYPHS = 10, 6


def tiny_hunyuan_video15(heads: int = 2) -> HunyuanVideo15Pipeline:
    """Text to video with guidance 3: two dual-stream blocks, heads of 16."""
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    ).eval()
    vae = AutoencoderKLHunyuanVideo15(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    return HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )


def embeddings(*lengths: int, glyphs: int = 2) -> dict[str, torch.Tensor]:
    """Arguments of a run: each prompt has so many real text tokens of `TEXT`, and `glyphs` real ones of `GLYPHS`."""
    generator = torch.Generator().manual_seed(len(lengths))
    arguments = {}
    for prefix, shift in (("", 0), ("negative_", 1)):
        counts = torch.tensor(lengths) - shift
        for suffix, tokens, width, real in (
            ("", TEXT, 16, counts),
            ("_2", GLYPHS, 32, torch.full_like(counts, glyphs)),
        ):
            embeds = torch.randn(len(lengths), tokens, width, generator=generator)
            arguments[f"{prefix}prompt_embeds{suffix}"] = embeds
            arguments[f"{prefix}prompt_embeds_mask{suffix}"] = (torch.arange(tokens) < real[:, None]).float()
    return arguments
