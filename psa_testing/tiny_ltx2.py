"""The components of tiny random LTX-2 pipelines: 2 layers, 2 heads of 16, a video VAE of 4 x 4 x 4, and sound."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from psa_testing.tiny_pipelines import TEXT_DIM, tiny_tokenizer

# What LTX-2.3 and 2.5 have and 2.0 has not.
NEWER: dict[str, Any] = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
NEWEST: dict[str, Any] = {**NEWER, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
MEL_BINS = 16


def tiny_transformer(**config: Any) -> LTX2VideoTransformer3DModel:
    """A transformer whose gates, if it has any, are not all alike."""
    torch.manual_seed(0)
    return LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT_DIM,
        norm_elementwise_affine=True,
        **config,
    ).eval()


def _text_encoder() -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": 128,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**image, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=127)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def _connectors(newer: bool) -> LTX2TextConnectors:
    """Without learned registers, which take the place of padding."""
    kinds = {"num_attention_heads": 2, "num_layers": 1, "num_learnable_registers": None}
    widths = {"video": 16, "audio": 8 if newer else 16}
    settings: dict[str, Any] = {
        f"{kind}_connector_{name}": value
        for kind, width in widths.items()
        for name, value in {**kinds, "attention_head_dim": width}.items()
    }
    if newer:
        settings |= {"per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16}
    torch.manual_seed(0)
    return LTX2TextConnectors(
        caption_channels=TEXT_DIM, text_proj_in_factor=3, rope_double_precision=False, **settings
    ).eval()


def _video_vae() -> AutoencoderKLLTX2Video:
    torch.manual_seed(0)
    return AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
        patch_size=1,
        decoder_causal=False,
    ).eval()


def _sound() -> dict[str, Any]:
    """The VAE of mel spectrograms, with 4 latent mel bins in 2 channels, and what makes a wave of them."""
    torch.manual_seed(0)
    return {
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=8,
            ch_mult=(1, 1, 1),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=MEL_BINS,
        ).eval(),
        "vocoder": LTX2Vocoder(
            in_channels=2 * MEL_BINS,
            hidden_channels=32,
            upsample_kernel_sizes=[16, 15],
            upsample_factors=[16, 10],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ).eval(),
    }


def parts(**config: Any) -> dict[str, Any]:
    """The components of a pipeline; `config` is the transformer's."""
    return {
        "transformer": tiny_transformer(**config),
        "vae": _video_vae(),
        "connectors": _connectors("gated_attn" in config),
        "text_encoder": _text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        **_sound(),
    }
