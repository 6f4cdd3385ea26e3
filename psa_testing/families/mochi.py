"""Mochi: a tiny random pipeline with 2 layers and 2 heads of 16, and the published transformer.

The last layer has no output for text. The published configuration is that of `scripts/convert_mochi_to_diffusers.py` of
diffusers (58eb52c; 48 blocks) and of the class's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from psa_diffusers.families.mochi import Mochi
from psa_testing.cases import (
    GUIDED,
    SIZES,
    SMALL_TEXT,
    TWO_PROMPTS,
    UNEVEN,
    Case,
    JointText,
    ParallelCase,
    Ranks,
    SavedCase,
)
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import TOY_TEXT, Inputs, Latents, Network, Noise, Published
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


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    inputs = noise.padded_text(config.max_sequence_length, config.text_embed_dim)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bool()
    return inputs


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "text_embed_dim": 32,
        "time_embed_dim": 4,
        "max_sequence_length": TOY_TEXT,
    }


_RUN: Inputs = {**GUIDED, **SMALL_TEXT, "num_frames": 13}

TESTS = FamilyTests(
    family=Mochi,
    cases={
        "mochi": Case(
            tiny_mochi,
            _RUN,
            (SIZES[0], {"num_frames": 7}, TWO_PROMPTS, {"num_videos_per_prompt": 2}),
            one_each=True,
            text=JointText(16, (1, 4, 6, 15), {"negative_prompt": ["", "bad"]}),
        ),
    },
    networks={
        # The last block is of another kind than those before.
        "MochiTransformer3DModel": Network(_inputs, _toy, one_block={"num_layers": 2}, kinds=2, reads_masks=True),
    },
    published=(
        Published(
            "genmo/mochi-1-preview",
            "MochiTransformer3DModel",
            {},
            latents=(1, 12, 15, 60, 106),
            layers=48,
            heads=24,
            head_dim=128,
            grid=(15, 30, 53),
            text=256,
            toy=True,
        ),
    ),
    parallel={
        "mochi": ParallelCase(
            Case(lambda: tiny_mochi(heads=4), _RUN),
            (Ranks(2, "patch", {**UNEVEN, **TWO_PROMPTS}, any_length=True),),
        ),
    },
    saved={"mochi": SavedCase(tiny_mochi, size=64, frames=13)},
    masks_padding=True,
    has_set_attn_processor=False,
)
