"""HunyuanVideo 1.5: tiny random pipelines, and the published transformers.

The tiny pipelines have no text encoders, so a run gives embeddings and masks. The published configurations are those of
`scripts/convert_hunyuan_video1_5_to_diffusers.py` of diffusers (58eb52c): the class's defaults but for two keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from psa_diffusers.families.hunyuan_video15 import HunyuanVideo15
from psa_testing.cases import IMAGE, Case, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_image, tiny_text_encoder, tiny_tokenizer

TEXT, GLYPHS = 10, 6


def _parts(heads: int, **config: Any) -> dict[str, Any]:
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
        **config,
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
    return {
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def tiny_hunyuan_video15(heads: int = 2) -> HunyuanVideo15Pipeline:
    """Text to video with guidance 3: two dual-stream blocks, heads of 16."""
    return HunyuanVideo15Pipeline(**_parts(heads, target_size=16, task_type="t2v"))


def tiny_hunyuan_video15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    """Image to video, whose size is the image's shape at 32 x 32 pixels of area; 4 tokens are the image's."""
    vision = SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=15
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **_parts(2, target_size=32, task_type="i2v"),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 30, "width": 30}),
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


def _with_text_encoders(pipe: Any) -> Any:
    """A saved pipeline has text encoders; here nothing calls them."""
    pipe.register_modules(
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_text_encoder(),
        tokenizer_2=tiny_tokenizer(),
    )
    return pipe


def _encode_prompt(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Whatever it is asked, its text is the same: its text encoders have no tiny build."""
    return tuple(embeddings(7)[f"prompt_embeds{part}"] for part in ("", "_mask", "_2", "_mask_2"))


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    image = noise(1, noise.tokens(729), config.image_embed_dim)
    if config.task_type == "t2v":  # without an image its embeddings are zero, and the model masks them
        image = torch.zeros_like(image)
    texts = noise.padded_text(1000, config.text_embed_dim) | noise.padded_text(256, config.text_embed_2_dim, "_2")
    # Its pipeline gives masks and timesteps of the embeddings' type.
    masks = {name: mask.to(noise.dtype) for name, mask in texts.items() if "mask" in name}
    return {**texts, **masks, "timestep": noise.timestep().to(noise.dtype), "image_embeds": image}


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 32,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    }


_480P = Published(
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
    "HunyuanVideo15Transformer3DModel",
    {"target_size": 640, "task_type": "t2v"},
    latents=(1, 65, 31, 30, 53),
    layers=54,
    heads=16,
    head_dim=128,
    grid=(31, 30, 53),
    # 1000 tokens, 256 of glyphs and 729 of an image, which are padding in text to video.
    text=1000 + 256 + 729,
    vae={"spatial_compression_ratio": 16, "temporal_compression_ratio": 4},
    toy=True,
)
_I2V_480P = replace(
    _480P,
    checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    config={"target_size": 640, "task_type": "i2v"},
    toy=False,
)
_STAND_INS = {"encode_prompt": _encode_prompt}
_RUN: Inputs = {"prompt": None, "height": 32, "width": 32, "num_frames": 5, **embeddings(7)}

TESTS = FamilyTests(
    family=HunyuanVideo15,
    cases={
        "hunyuan-video-1.5": Case(
            tiny_hunyuan_video15,
            _RUN,
            ({"height": 24, "width": 40}, embeddings(10, 4), {**embeddings(5, glyphs=0), "num_frames": 3}),
            one_each=True,
        ),
        # The size is the image's alone, and no argument.
        "hunyuan-video-1.5-i2v": Case(
            tiny_hunyuan_video15_i2v,
            {**_RUN, "height": None, "width": None, "image": IMAGE},
            ({"image": tiny_image(160, 96)}, embeddings(10, 4)),
        ),
    },
    networks={
        "HunyuanVideo15Transformer3DModel": Network(
            _inputs, _toy, toy_latents=lambda published: (1, published.latents[1], 3, 8, 8), reads_masks=True
        ),
    },
    published=(
        _480P,
        replace(
            _480P,
            checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
            config={"target_size": 960, "task_type": "t2v"},
            latents=(1, 65, 31, 45, 80),
            grid=(31, 45, 80),
            toy=False,
        ),
        _I2V_480P,
        replace(
            _I2V_480P,
            checkpoint="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_i2v",
            config={"target_size": 960, "task_type": "i2v"},
            latents=(1, 65, 31, 45, 80),
            grid=(31, 45, 80),
        ),
    ),
    parallel={
        "hunyuan-video-1.5": ParallelCase(Case(lambda: tiny_hunyuan_video15(heads=4), _RUN), (Ranks(2, "patch"),)),
    },
    saved={
        "hunyuan-video-1.5": SavedCase(
            lambda: _with_text_encoders(tiny_hunyuan_video15()), size=32, frames=5, stand_ins=_STAND_INS
        ),
        "hunyuan-video-1.5-i2v": SavedCase(
            lambda: _with_text_encoders(tiny_hunyuan_video15_i2v()), size=32, frames=5, stand_ins=_STAND_INS
        ),
    },
    masks_padding=True,
)
