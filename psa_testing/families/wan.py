"""Wan 2.1 and 2.2: tiny random pipelines of VACE and Animate with 2 or 3 layers and 2 heads of 16, and the published
transformers.

Wan's plain pipelines are made in `psa_testing/tiny_pipelines.py`, which tests of all kinds use. The published
configurations are those of `scripts/convert_wan_to_diffusers.py` of diffusers (58eb52c), which made the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from psa_diffusers.families.wan import Wan
from psa_testing.cases import GUIDED, IMAGE, SMALL_TEXT, TWO_PROMPTS, UNEVEN, Case, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import (
    TEXT_DIM,
    tiny_image,
    tiny_lucy_edit,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
    tiny_wan,
)

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def parts(transformer: torch.nn.Module) -> dict[str, Any]:
    """The components of a pipeline."""
    vae = tiny_vae()
    torch.manual_seed(0)
    return {
        "transformer": transformer.eval(),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
    }


def tiny_wan_vace() -> WanVACEPipeline:
    """Wan with two control blocks, which feed blocks 0 and 2."""
    torch.manual_seed(0)
    config = {**TRANSFORMER, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    return WanVACEPipeline(**parts(WanVACETransformer3DModel(**config)))


def tiny_wan_animate() -> WanAnimatePipeline:
    """Wan that follows a pose and a face video, segment by segment; a reference frame precedes the segment's frames."""
    torch.manual_seed(0)
    transformer = WanAnimateTransformer3DModel(
        **{**TRANSFORMER, "in_channels": 36},
        latent_channels=16,
        image_dim=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    return WanAnimatePipeline(
        **parts(transformer),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=4, size=4),
    )


def inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    """What Wan's pipelines give the transformer."""
    made: Inputs = {"encoder_hidden_states": noise.text(512, config.text_dim)}
    if config.added_kv_proj_dim:
        made["encoder_hidden_states_image"] = noise(1, 257, config.image_dim)  # of CLIP's image encoder
    if config.out_channels == 48:  # the models of 5B, whose pipelines give every token a timestep
        _, frames, height, width = latents[1:]
        made["timestep"] = noise.timestep(1, frames * (height // 2) * (width // 2))
    return made


def _vace_inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    control = noise(1, config.vace_in_channels, *latents[2:])
    return {**inputs(config, latents, noise), "control_hidden_states": control}


def _animate_inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    frames, size = latents[2] - 1, config.motion_encoder_size  # without that of the reference image
    return {
        **inputs(config, latents, noise),
        "pose_hidden_states": noise(1, config.latent_channels, frames, *latents[3:]),
        "face_pixel_values": noise(1, 3, 4 * frames - 3, size, size).clamp(-1, 1),
    }


def toy(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a toy of a transformer of Wan's architecture."""
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "ffn_dim": 64,
        "freq_dim": 32,
        "text_dim": 32,
    }
    return {**small, "image_dim": 8, "added_kv_proj_dim": 64} if "added_kv_proj_dim" in config else small


def _animate_toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **toy(config),
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
    }


def published(
    checkpoint: str,
    latents: Latents,
    grid: tuple[int, int, int],
    size: str,
    config: Mapping[str, Any] | None = None,
    **about: Any,
) -> Published:
    """A transformer of Wan's architecture, of 1.3B, 5B or 14B parameters; `about` are other fields of its row."""
    layers, heads, ffn = {"1.3B": (30, 12, 8960), "5B": (30, 24, 14336), "14B": (40, 40, 13824)}[size]
    base = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "in_channels": latents[1],
        "out_channels": 16,
    }
    config = {**base, **(config or {})}
    layers += len(config.get("vace_layers", ()))
    about = {"model": "WanTransformer3DModel", "vae": VAE, **about}
    return Published(
        checkpoint, config=config, latents=latents, layers=layers, heads=heads, head_dim=128, grid=grid, **about
    )


VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
IMAGE_CONFIG = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_VACE: dict[str, Any] = {"vace_in_channels": 96}
_ANIMATE: dict[str, Any] = {
    "motion_encoder_size": 512,
    "motion_style_dim": 512,
    "motion_dim": 20,
    "motion_encoder_dim": 512,
    "face_encoder_hidden_dim": 1024,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 5,
}
_480P, _720P = (21, 30, 52), (21, 45, 80)
_PUBLISHED = (
    published("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (1, 16, 21, 60, 104), _480P, "1.3B", toy=True),
    published("Wan-AI/Wan2.1-T2V-14B-Diffusers", (1, 16, 21, 90, 160), _720P, "14B"),
    published("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (1, 36, 21, 60, 104), _480P, "14B", IMAGE_CONFIG),
    published("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", (1, 36, 21, 90, 160), _720P, "14B", IMAGE_CONFIG, toy=True),
    published("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (1, 16, 21, 90, 160), _720P, "14B", experts=2),
    published("Wan-AI/Wan2.2-I2V-A14B-Diffusers", (1, 36, 21, 60, 104), _480P, "14B", experts=2),
    published(
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        (1, 48, 31, 44, 80),
        (31, 22, 40),
        "5B",
        {"out_channels": 48},
        vae={"scale_factor_spatial": 16, "scale_factor_temporal": 4},
        toy=True,
    ),
    # The latents of the video that it edits go in beside the noise.
    published(
        "decart-ai/Lucy-Edit-Dev",
        (1, 96, 21, 30, 52),
        (21, 15, 26),
        "5B",
        {"out_channels": 48},
        vae={"scale_factor_spatial": 16, "scale_factor_temporal": 4},
    ),
    published(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        (1, 16, 21, 60, 104),
        _480P,
        "1.3B",
        {**_VACE, "vace_layers": list(range(0, 30, 2))},
        model="WanVACETransformer3DModel",
    ),
    published(
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        (1, 16, 21, 90, 160),
        _720P,
        "14B",
        {**_VACE, "vace_layers": list(range(0, 40, 5))},
        model="WanVACETransformer3DModel",
        toy=True,
    ),
    # A segment of 77 frames, and the reference frame before it.
    published(
        "Wan-AI/Wan2.2-Animate-14B-Diffusers",
        (1, 36, 21, 90, 160),
        _720P,
        "14B",
        {**IMAGE_CONFIG, **_ANIMATE},
        model="WanAnimateTransformer3DModel",
        toy=True,
    ),
)
_RUN: Inputs = {**GUIDED, **SMALL_TEXT}

TESTS = FamilyTests(
    family=Wan,
    cases={
        "wan": Case(lambda: tiny_wan(num_layers=2), _RUN, one_each=True, fuses=True),
        "wan-vace": Case(
            tiny_wan_vace,
            {**_RUN, "height": 96, "width": 96, "num_inference_steps": 3},
            (
                {"height": 64, "width": 112},
                {"video": [IMAGE] * 9, "mask": [IMAGE.convert("L")] * 9, "reference_images": [IMAGE]},
            ),
            one_each=True,
            fuses=True,
        ),
        "lucy-edit": Case(lambda: tiny_lucy_edit(num_layers=2), {**_RUN, "video": [IMAGE] * 9}),
        "wan-animate": Case(
            tiny_wan_animate,
            {
                **GUIDED,
                "image": IMAGE,
                "pose_video": [IMAGE] * 9,
                "face_video": [tiny_image(16, 16)] * 9,
                "segment_frame_length": 9,
                "num_frames": None,
                "height": 96,
                "width": 96,
                "num_inference_steps": 3,
            },
            one_each=True,
        ),
    },
    networks={
        "WanTransformer3DModel": Network(inputs, toy),
        "WanVACETransformer3DModel": Network(
            _vace_inputs,
            lambda config: {**toy(config), "vace_layers": [0]},
            one_block={"num_layers": 1, "vace_layers": [0]},
            kinds=2,
        ),
        "WanAnimateTransformer3DModel": Network(
            _animate_inputs, _animate_toy, one_block={"num_layers": 1, "inject_face_latents_blocks": 1}
        ),
    },
    published=_PUBLISHED,
    parallel={
        "wan": ParallelCase(
            Case(lambda: tiny_wan(heads=4, head_dim=16, num_layers=2), _RUN),
            (Ranks(2), Ranks(4, "patch", {**UNEVEN, **TWO_PROMPTS}, any_length=True)),
        ),
        "wan-two-experts": ParallelCase(
            Case(lambda: tiny_wan(True, heads=4, head_dim=16, num_layers=2), _RUN),
            (Ranks(2, "patch", {"num_inference_steps": 4}),),
        ),
    },
    saved={"wan-vace": SavedCase(tiny_wan_vace, size=64, frames=9)},
)
