"""CogVideoX: tiny random pipelines with 3 layers and 2 heads of 16, and the published transformers.

Their configurations are those of `scripts/convert_cogvideox_to_diffusers.py` of diffusers (58eb52c): the class's
defaults but for the keys here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from psa_diffusers.families.cogvideox import CogVideoX
from psa_testing.cases import (
    GUIDED,
    IMAGE,
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


def parts(scheduler: type = CogVideoXDDIMScheduler, **config: Any) -> dict[str, Any]:
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


def tiny_cogvideox_2b(**config: Any) -> CogVideoXPipeline:
    """As CogVideoX 2B: added sinusoidal positions, DDIM."""
    return CogVideoXPipeline(**parts(**config))


def tiny_cogvideox_5b(**config: Any) -> CogVideoXPipeline:
    """As CogVideoX 5B: rotary positions, DPM."""
    return CogVideoXPipeline(**parts(CogVideoXDPMScheduler, use_rotary_positional_embeddings=True, **config))


def tiny_cogvideox_1_5() -> CogVideoXPipeline:
    """As CogVideoX 1.5: rotary positions, two latent frames a patch."""
    return CogVideoXPipeline(**parts(CogVideoXDPMScheduler, use_rotary_positional_embeddings=True, **VERSION_1_5))


def tiny_cogvideox_i2v() -> CogVideoXImageToVideoPipeline:
    """Image to video: as many channels again for the image."""
    return CogVideoXImageToVideoPipeline(**parts(in_channels=8, use_rotary_positional_embeddings=True))


def inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    made: Inputs = {"encoder_hidden_states": noise.text(config.max_text_seq_length, config.text_embed_dim)}
    patch, patch_t = config.patch_size, config.get("patch_size_t")
    size = (latents[3] // patch, latents[4] // patch)
    where: Inputs = {"crops_coords": ((0, 0), size), "temporal_size": latents[1]}
    if patch_t is not None:
        largest = (config.sample_height // patch, config.sample_width // patch)
        where = {"crops_coords": None, "temporal_size": latents[1] // patch_t, "grid_type": "slice"}
        where["max_size"] = largest
    if config.use_rotary_positional_embeddings:
        device = torch.device(noise.device)
        made["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=size, device=device, **where
        )
    if config.get("ofs_embed_dim") is not None:
        made["ofs"] = torch.full((1,), 2.0, dtype=noise.dtype, device=noise.device)
    return made


def toy(config: Mapping[str, Any]) -> dict[str, Any]:
    toy = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "max_text_seq_length": TOY_TEXT,
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 9,
    }
    return {**toy, "ofs_embed_dim": 8} if "ofs_embed_dim" in config else toy


def toy_latents(published: Published) -> Latents:
    return (1, 3 * published.config.get("patch_size_t", 1), published.latents[2], 16, 16)


_2B = Published(
    "zai-org/CogVideoX-2b",
    "CogVideoXTransformer3DModel",
    {
        "patch_size": 2,
        "sample_height": 60,
        "sample_width": 90,
        "sample_frames": 49,
        "num_layers": 30,
        "num_attention_heads": 30,
    },
    latents=(1, 13, 16, 60, 90),
    layers=30,
    heads=30,
    head_dim=64,
    grid=(13, 30, 45),
    text=226,
    vae={"temporal_compression_ratio": 4},
    toy=True,
)
_5B = replace(
    _2B,
    checkpoint="zai-org/CogVideoX-5b",
    config={
        **_2B.config,
        "num_layers": 42,
        "num_attention_heads": 48,
        "use_rotary_positional_embeddings": True,
    },
    layers=42,
    heads=48,
    toy=False,
)
I2V_5B = replace(
    _5B,
    checkpoint="zai-org/CogVideoX-5b-I2V",
    config={**_5B.config, "in_channels": 32, "use_learned_positional_embeddings": True},
    latents=(1, 13, 32, 60, 90),
    toy=True,
)
# 81 frames are 21 latent frames, to which the pipeline adds one: patches take two.
_1_5 = replace(
    _5B,
    checkpoint="zai-org/CogVideoX1.5-5B",
    config={
        **_5B.config,
        "patch_size_t": 2,
        "patch_bias": False,
        "sample_height": 300,
        "sample_width": 300,
        "sample_frames": 81,
    },
    latents=(1, 22, 16, 96, 170),
    grid=(11, 48, 85),
)
_1_5_I2V = replace(
    _1_5,
    checkpoint="zai-org/CogVideoX1.5-5B-I2V",
    config={**_1_5.config, "in_channels": 32, "ofs_embed_dim": 512},
    latents=(1, 22, 32, 96, 170),
    toy=True,
)

TESTS = FamilyTests(
    family=CogVideoX,
    cases={
        "cogvideox-2b": Case(tiny_cogvideox_2b, {**GUIDED, **SMALL_TEXT}, ({"num_frames": 13}, TWO_PROMPTS)),
        "cogvideox-5b": Case(
            tiny_cogvideox_5b,
            {**GUIDED, **SMALL_TEXT},
            (*SIZES, TWO_PROMPTS, {"guidance_scale": 1.0}, {"use_dynamic_cfg": True, "num_videos_per_prompt": 2}),
            one_each=True,
            text=JointText(16, (16,) * 4, {"negative_prompt": ["", "bad"]}),
        ),
        "cogvideox-1.5": Case(
            tiny_cogvideox_1_5,
            {**GUIDED, **SMALL_TEXT, "num_frames": 17},
            ({"num_frames": 9, "height": 96, "width": 160}, {"num_frames": 13}, TWO_PROMPTS),
        ),
        "cogvideox-i2v": Case(tiny_cogvideox_i2v, {**GUIDED, **SMALL_TEXT, "image": IMAGE}, SIZES[1:]),
    },
    networks={
        "CogVideoXTransformer3DModel": Network(inputs, toy, toy_latents=toy_latents, frames_first=True),
    },
    published=(_2B, _5B, I2V_5B, _1_5, _1_5_I2V),
    parallel={
        "cogvideox-5b": ParallelCase(
            Case(lambda: tiny_cogvideox_5b(num_attention_heads=4), {**GUIDED, **SMALL_TEXT}),
            (Ranks(2, "patch", UNEVEN, any_length=True), Ranks(4)),
        ),
        "cogvideox-2b": ParallelCase(
            Case(lambda: tiny_cogvideox_2b(num_attention_heads=4), {**GUIDED, **SMALL_TEXT}), (Ranks(2),)
        ),
    },
    saved={"cogvideox-1.5": SavedCase(tiny_cogvideox_1_5, size=64, frames=17)},
)
