"""Allegro: a tiny random pipeline with 2 layers and 2 heads of 12, and the published transformer.

Its configuration is transformer/config.json of rhymes-ai/Allegro.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from psa_diffusers.families.allegro import Allegro
from psa_testing.cases import GUIDED, SIZES, SMALL_TEXT, TWO_PROMPTS, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
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


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    size = (latents[3] // config.patch_size, latents[4] // config.patch_size)
    *tables, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim,
        ((0, 0), size),
        size,
        latents[2],
        (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w),
        device=torch.device(noise.device),
    )
    positions = torch.cartesian_prod(*(axis.long() for axis in (frames, rows, columns)))
    rotary = (tuple(tables), tuple(positions.T[:, None].contiguous()))
    return {**noise.padded_text(512, config.caption_channels), "image_rotary_emb": rotary}


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 3,
    }


TESTS = FamilyTests(
    family=Allegro,
    cases={
        "allegro": Case(
            tiny_allegro,
            {**GUIDED, **SMALL_TEXT, "clean_caption": False},
            (SIZES[0], {"num_frames": 13}, TWO_PROMPTS),
            one_each=True,
        ),
    },
    networks={"AllegroTransformer3DModel": Network(_inputs, _toy)},
    published=(
        Published(
            "rhymes-ai/Allegro",
            "AllegroTransformer3DModel",
            {
                "num_attention_heads": 24,
                "attention_head_dim": 96,
                "num_layers": 32,
                "cross_attention_dim": 2304,
                "sample_height": 90,
                "sample_width": 160,
                "sample_frames": 22,
            },
            latents=(1, 4, 22, 90, 160),
            layers=32,
            heads=24,
            head_dim=96,
            grid=(22, 45, 80),
            toy=True,
        ),
    ),
    saved={"allegro": SavedCase(tiny_allegro, size=64, frames=8)},
    masks_padding=True,
    takes_lora=False,
    has_set_attn_processor=False,
)
