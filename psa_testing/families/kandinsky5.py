"""Kandinsky 5: tiny random pipelines with two visual blocks, 2 heads of 16, and the published transformers.

The tiny pipelines have no text encoders, so a run gives embeddings. The published configurations are those of
`configs/` of kandinskylab/kandinsky-5 (ae7d348), which the hub's transformer/config.json of Lite repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from psa_diffusers.families.kandinsky5 import Kandinsky5
from psa_testing.cases import IMAGE, SIZES, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.families.hunyuan_video import tiny_vae
from psa_testing.full_size import TOY_TOKENS, Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer

TEXT_WIDTH, POOLED_WIDTH = 32, 8


def _parts(**config: Any) -> dict[str, Any]:
    settings = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": POOLED_WIDTH,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 2,
        "axes_dims": (4, 6, 6),
        "visual_cond": True,
    }
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(**{**settings, **config}).eval()
    for name, parameter in transformer.named_parameters():
        # The model starts with these at zero, and its blocks without effect. A small effect it is, because the model
        # rounds queries and keys to bfloat16, which makes much of whatever float32 rounds.
        if "modulation.out_layer" in name:
            torch.nn.init.normal_(parameter, std=0.03)
    return {
        "transformer": transformer,
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
    }


def tiny_kandinsky5(**config: Any) -> Kandinsky5T2VPipeline:
    """Text to video. `config` overrides the transformer's."""
    return Kandinsky5T2VPipeline(**_parts(**config))


def tiny_kandinsky5_i2v() -> Kandinsky5I2VPipeline:
    """Image to video: the first frame is the image's."""
    return Kandinsky5I2VPipeline(**_parts())


def tiny_kandinsky5_t2i() -> Kandinsky5T2IPipeline:
    """Text to an image of 256 x 192 pixels, and no other size."""
    pipe = Kandinsky5T2IPipeline(**_parts(visual_cond=False))
    pipe.resolutions = [(192, 256)]
    return pipe


def _encoded(lengths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of text and its pooled ones, and where the texts would begin one after another."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    text = torch.randn(len(counts), int(counts.max()), TEXT_WIDTH, generator=generator)
    pooled = torch.randn(len(counts), POOLED_WIDTH, generator=generator)
    return text, pooled, torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])


def embeddings(*lengths: int) -> Inputs:
    """Arguments of a run with prompts of so many tokens, and negative ones of three more."""
    arguments: Inputs = {}
    for prefix, more in (("", 0), ("negative_", 3)):
        names = (f"{prefix}prompt_embeds_qwen", f"{prefix}prompt_embeds_clip", f"{prefix}prompt_cu_seqlens")
        encoded = _encoded(tuple(length + more for length in lengths), more)
        arguments.update(zip(names, encoded, strict=True))
    return arguments


def _with_text_encoders() -> Kandinsky5T2VPipeline:
    """A saved pipeline has text encoders; here nothing calls them."""
    pipe = tiny_kandinsky5()
    encoders = {"text_encoder": tiny_text_encoder(), "text_encoder_2": tiny_text_encoder()}
    pipe.register_modules(**encoders, tokenizer=tiny_tokenizer(), tokenizer_2=tiny_tokenizer())
    return pipe


def _encode_prompt(pipe: Kandinsky5T2VPipeline, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Whatever it is asked, its text is the same: its text encoders have no tiny build."""
    return _encoded((7,), 0)


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    # No text is padded: a batch has one length.
    text = noise.text(256, config.in_text_dim)
    grid = (size // patch for size, patch in zip(latents[1:4], config.patch_size, strict=True))
    return {
        "encoder_hidden_states": text,
        "pooled_projections": noise(1, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(size, device=noise.device) for size in grid],
        "text_rope_pos": torch.arange(text.shape[1], device=noise.device),
        "scale_factor": (1, 2, 2),
    }


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_dim": 32,
        "ff_dim": 64,
        "time_dim": 16,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": POOLED_WIDTH,
        "axes_dims": (4, 6, 6),
    }


def channels_last(published: Published) -> Latents:
    """`[1, frames, height, width, C]` of a toy with patches of one frame and 2 x 2 latents."""
    frames, height, width = TOY_TOKENS
    return (1, frames, 2 * height, 2 * width, published.latents[-1])


_LITE = Published(
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
    "Kandinsky5Transformer3DModel",
    {
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": 512,
        "patch_size": (1, 2, 2),
        "model_dim": 1792,
        "ff_dim": 7168,
        "num_text_blocks": 2,
        "num_visual_blocks": 32,
        "axes_dims": (16, 24, 24),
        "visual_cond": True,
    },
    latents=(1, 31, 64, 96, 33),
    layers=32,
    heads=28,
    head_dim=64,
    grid=(31, 32, 48),
    vae={"spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    toy=True,
)
_RUN: Inputs = {"prompt": None, "guidance_scale": 3.0, **embeddings(7)}
# Its pipeline compares the first four latent frames with those that follow.
_WITH_IMAGE: Inputs = {**_RUN, "image": IMAGE, "num_frames": 21, "height": 96, "width": 96}
_IMAGE_RUN: Inputs = {**_RUN, "num_frames": None, "height": 256, "width": 192}

TESTS = FamilyTests(
    family=Kandinsky5,
    cases={
        "kandinsky5": Case(
            tiny_kandinsky5,
            _RUN,
            (*SIZES, {"guidance_scale": 1.0}, embeddings(9, 5)),
            one_each=True,
        ),
        "kandinsky5-i2v": Case(tiny_kandinsky5_i2v, _WITH_IMAGE, ({"num_frames": 25, "height": 64},)),
        "kandinsky5-t2i": Case(
            tiny_kandinsky5_t2i, _IMAGE_RUN, (embeddings(9, 5),), call=lambda pipe, inputs: pipe(**inputs).image
        ),
    },
    networks={
        "Kandinsky5Transformer3DModel": Network(
            _inputs,
            _toy,
            toy_latents=channels_last,
            one_block={"num_text_blocks": 1, "num_visual_blocks": 1},
            channels_last=True,
        ),
    },
    published=(
        _LITE,
        *(
            replace(_LITE, checkpoint=f"kandinskylab/Kandinsky-5.0-{name}-5s-Diffusers", toy=False)
            for name in ("T2V-Lite-nocfg", "T2V-Lite-distilled16steps", "I2V-Lite")
        ),
        replace(
            _LITE,
            checkpoint="kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
            config={
                **_LITE.config,
                "model_dim": 2560,
                "ff_dim": 10240,
                "num_visual_blocks": 50,
                "axes_dims": (32, 48, 48),
                "visual_cond": False,
            },
            latents=(1, 1, 128, 128, 16),
            layers=50,
            heads=20,
            head_dim=128,
            grid=(1, 64, 64),
            vae={},
            toy=False,
        ),
    ),
    saved={
        "kandinsky5": SavedCase(_with_text_encoders, size=64, frames=9, stand_ins={"encode_prompt": _encode_prompt}),
    },
    mask=None,
)
