"""Motif-Video: tiny random pipelines with dual-stream, single-stream and decoder blocks, and the published transformer.

Its configuration is that of Motif-Technologies/Motif-Video-2B's transformer/config.json, as its card and its nodes for
ComfyUI have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import SiglipImageProcessor, T5Gemma2Encoder, T5Gemma2EncoderConfig

from psa_diffusers.families.motif_video import MotifVideo
from psa_testing.cases import IMAGE, SIZES, SMALL_TEXT, TWO_PROMPTS, Case, JointText, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_tokenizer, tiny_vae

VISION = 16  # width of the image encoder


def _text_encoder() -> T5Gemma2Encoder:
    """One layer; its image encoder makes 4 tokens of an image."""
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "dropout_rate": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": VISION,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "vision_use_head": False,
    }
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision)).eval()


def _parts(**config: Any) -> dict[str, Any]:
    settings = {
        "in_channels": 2 * 16 + 1,
        "out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": 32,
        "image_embed_dim": VISION,
        "rope_axes_dim": (4, 6, 6),  # sums to the head dimension
        "enable_text_cross_attention_single": True,
    }
    torch.manual_seed(0)
    return {
        "transformer": MotifVideoTransformer3DModel(**{**settings, **config}).eval(),
        "text_encoder": _text_encoder(),
        "tokenizer": tiny_tokenizer(),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def tiny_motif_video(**config: Any) -> MotifVideoPipeline:
    """Text to video with guidance 3: one block of each kind. `config` overrides the transformer's."""
    return MotifVideoPipeline(**_parts(**config))


def tiny_motif_video_i2v() -> MotifVideoImage2VideoPipeline:
    """Image to video: the image's tokens precede those of the text, after the video."""
    return MotifVideoImage2VideoPipeline(**_parts(enable_text_cross_attention_dual=True))


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    inputs = noise.padded_text(512, config.text_embed_dim)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bool()
    return inputs


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "text_embed_dim": 32,
        "rope_axes_dim": (4, 6, 6),
    }


_RUN: Inputs = {**SMALL_TEXT, "negative_prompt": "bad"}

TESTS = FamilyTests(
    family=MotifVideo,
    cases={
        "motif-video": Case(
            tiny_motif_video,
            _RUN,
            (*SIZES, TWO_PROMPTS, {"num_videos_per_prompt": 2}),
            one_each=True,
        ),
        # All its calls are joint.
        "motif-video-encoder": Case(
            lambda: tiny_motif_video(num_decoder_layers=0),
            _RUN,
            text=JointText(16, (6, 15), {"negative_prompt": ["a cat", "a dog, running"]}),
        ),
        "motif-video-i2v": Case(tiny_motif_video_i2v, {**_RUN, "image": IMAGE}, (SIZES[0],)),
    },
    networks={
        "MotifVideoTransformer3DModel": Network(
            _inputs,
            _toy,
            one_block={"num_layers": 1, "num_single_layers": 2, "num_decoder_layers": 1},
            kinds=3,
        ),
    },
    published=(
        Published(
            "Motif-Technologies/Motif-Video-2B",
            "MotifVideoTransformer3DModel",
            {
                "in_channels": 33,
                "out_channels": 16,
                "num_attention_heads": 12,
                "attention_head_dim": 128,
                "num_layers": 12,
                "num_single_layers": 24,
                "num_decoder_layers": 8,
                "patch_size": 2,
                "patch_size_t": 1,
                "text_embed_dim": 2560,
                "image_embed_dim": 1152,
                "rope_theta": 10000.0,
                "rope_axes_dim": (16, 56, 56),
                "enable_text_cross_attention_single": True,
            },
            latents=(1, 33, 31, 92, 160),
            layers=36,
            heads=12,
            head_dim=128,
            grid=(31, 46, 80),
            text=512,
            vae={"scale_factor_spatial": 8, "scale_factor_temporal": 4},
            toy=True,
        ),
    ),
    saved={"motif-video": SavedCase(tiny_motif_video, size=64, frames=9)},
    masks_padding=True,
)
