"""Kandinsky 6: tiny random pipelines with two blocks, 2 video heads and 1 audio head of 16, and the published
transformers.

Their configurations are those of the hub's transformer/config.json, as SGLang's and FastVideo's tests repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)

from psa_diffusers.families.kandinsky6 import Kandinsky6
from psa_testing.cases import GUIDED, IMAGE, SIZES, TWO_PROMPTS, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.families import hunyuan_video
from psa_testing.families.kandinsky5 import channels_last
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published

VIDEO, AUDIO = 4, 4  # latent channels


def _sound() -> dict[str, torch.nn.Module]:
    """Few samples a second, so that few tokens are audio: 3 for 9 frames."""
    torch.manual_seed(0)
    audio_vae = MMAudioVAE(
        mel_bins=8,
        latent_channels=AUDIO,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = MMAudioVocoder(
        num_mels=8,
        upsample_initial_channel=8,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    return {"audio_vae": audio_vae.eval(), "vocoder": vocoder.eval()}


def tiny_kandinsky6(**config: Any) -> Kandinsky6TI2VAPipeline:
    """Text, or text and an image, to video and audio. `config` overrides the transformer's."""
    settings = {
        "in_visual_dim": VIDEO,
        "out_visual_dim": VIDEO,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "in_audio_dim": AUDIO,
        "out_audio_dim": AUDIO,
        "model_dim_a": 16,
        "ff_dim_a": 32,
        "axes_dims_a": (4, 6, 6),
        "text_token_padding": True,
        "ca_rope": True,
        "cross_gates": True,
        "fix_modulation": True,
        "visual_token_type_num_embeddings": 2,
    }
    torch.manual_seed(0)
    parts = hunyuan_video.parts(Kandinsky6Transformer3DModel(**{**settings, **config}))
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return Kandinsky6TI2VAPipeline(**parts, **_sound())


def tiny_kandinsky6_distilled() -> Kandinsky6TI2VAPipeline:
    """The model predicts several velocities a step, which its scheduler goes through."""
    pipe = tiny_kandinsky6(out_visual_dim=2 * VIDEO, out_audio_dim=2 * AUDIO)
    pipe.scheduler = PiflowScheduler(n_grid=2)
    return pipe


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    inputs = noise.padded_text(1024, config.in_text_dim)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bool()
    inputs["pooled_projections"] = noise(1, config.in_text_dim2)
    # 121 frames at 24 a second, 44,100 samples, of which 1024 are one latent.
    inputs["audio_hidden_states"] = noise(1, 218, config.in_audio_dim)
    return inputs


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_dim": 32,
        "ff_dim": 64,
        "time_dim": 16,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "in_text_dim": 32,
        "in_text_dim2": 8,
        "axes_dims": (4, 6, 6),
        "model_dim_a": 16,
        "time_dim_a": 16,
        "ff_dim_a": 32,
        "axes_dims_a": (4, 6, 6),
    }


_PRO = Published(
    "kandinskylab/Kandinsky-6.0-Pro-sft-5s-Diffusers",
    "Kandinsky6Transformer3DModel",
    {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": 1024,
        "patch_size": (1, 2, 2),
        "model_dim": 4096,
        "ff_dim": 16384,
        "num_text_blocks": 4,
        "num_visual_blocks": 60,
        "axes_dims": (32, 48, 48),
        "visual_cond": True,
        "in_audio_dim": 40,
        "out_audio_dim": 40,
        "model_dim_a": 2048,
        "time_dim_a": 1024,
        "ff_dim_a": 7168,
        "axes_dims_a": (32, 48, 48),
        "audio_freqs_scaling": 0.144,
        "scale_factor": (1.0, 2.0, 2.0),
        "text_token_padding": True,
        "ca_rope": True,
        "cross_gates": True,
        "fix_modulation": True,
        "visual_token_type_num_embeddings": 2,
    },
    latents=(1, 31, 60, 108, 33),
    layers=60,
    heads=32,
    head_dim=128,
    grid=(31, 30, 54),
    vae={"spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    toy=True,
)
# Its template has a token a letter here, of which most stand before the prompt.
_TEXT: Inputs = {"max_sequence_length": 576}
_RUN: Inputs = {**GUIDED, **_TEXT, "guidance_scale": 3.0}

TESTS = FamilyTests(
    family=Kandinsky6,
    cases={
        "kandinsky6": Case(
            tiny_kandinsky6,
            _RUN,
            (*SIZES, TWO_PROMPTS, {"sample_audio": False, "num_videos_per_prompt": 2}),
            one_each=True,
        ),
        "kandinsky6-image": Case(tiny_kandinsky6, {**_RUN, "image": IMAGE, "num_inference_steps": 3}),
        "kandinsky6-distilled": Case(tiny_kandinsky6_distilled, {**_TEXT, "guidance_scale": 1.0}),
    },
    networks={
        "Kandinsky6Transformer3DModel": Network(
            _inputs,
            _toy,
            toy_latents=channels_last,
            one_block={"num_text_blocks": 1, "num_visual_blocks": 1},
            channels_last=True,
        ),
    },
    published=(
        _PRO,
        replace(
            _PRO,
            checkpoint="kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers",
            config={**_PRO.config, "out_visual_dim": 160, "out_audio_dim": 400},
            toy=False,
        ),
    ),
    saved={"kandinsky6": SavedCase(tiny_kandinsky6, size=64, frames=9)},
    masks_padding=True,
    mask="attn_mask",
)
