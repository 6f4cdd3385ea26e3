"""EasyAnimate: tiny random pipelines with 3 layers and 2 heads of 16, and the published transformers.

The tiny pipelines have no text encoder, so a run gives embeddings and masks. The published configurations are that of
alibaba-pai/EasyAnimateV5.1-12b-zh-InP (transformer/config.json, 83f765f) with the channels of each: noise alone, with a
mask and the masked video, with a control signal and a reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimateControlPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from psa_diffusers.families.easyanimate import EasyAnimate
from psa_testing.cases import Case, JointText, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_text_encoder, tiny_tokenizer

MODEL = "EasyAnimateTransformer3DModel"
TEXT, WIDTH = 12, 32


def _parts(**config: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "time_embed_dim": 8,
            "text_embed_dim": WIDTH,
            "add_norm_text_encoder": True,
            "num_layers": 3,
            "mmdit_layers": 2,
            **config,
        }
    ).eval()
    vae = AutoencoderKLMagvit(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    ).eval()
    return {
        "transformer": transformer,
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "text_encoder": None,
        "tokenizer": None,
    }


def tiny_easyanimate(**config: Any) -> EasyAnimatePipeline:
    """Text to video; the last block has one set of projections for text and video."""
    return EasyAnimatePipeline(**_parts(**config))


def tiny_easyanimate_inpaint() -> EasyAnimateInpaintPipeline:
    """As many channels again for a video, and one for its mask."""
    return EasyAnimateInpaintPipeline(**_parts(in_channels=9))


class _ControlPipeline(EasyAnimateControlPipeline):
    """The pipeline as it is meant: that of diffusers 0.42 gives its own `encode_prompt` what it does not take."""

    def encode_prompt(self, *arguments: Any, text_encoder_index: int = 0, **settings: Any) -> tuple[torch.Tensor, ...]:
        return super().encode_prompt(*arguments, **settings)


def tiny_easyanimate_control() -> EasyAnimateControlPipeline:
    """As many channels again for a control video, and for a reference image."""
    return _ControlPipeline(**_parts(in_channels=12))


def embeddings(*lengths: int) -> dict[str, torch.Tensor]:
    """Arguments of a run: each prompt has so many real text tokens of `TEXT`; the model attends all."""
    generator = torch.Generator().manual_seed(len(lengths))
    arguments = {}
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds"] = torch.randn(len(lengths), TEXT, WIDTH, generator=generator)
        real = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
        arguments[f"{prefix}prompt_attention_mask"] = real.long()
    return arguments


def _with_text_encoder() -> EasyAnimatePipeline:
    """A saved pipeline has a text encoder; here nothing calls it."""
    pipe = tiny_easyanimate()
    pipe.register_modules(text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer())
    return pipe


def _encode_prompt(pipe: EasyAnimatePipeline, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Whatever it is asked, its text is the same: its text encoder has no tiny build."""
    made = embeddings(7)
    names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    return tuple(made[name] for name in names)


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    made: Inputs = {"encoder_hidden_states": noise.text(256, config.text_embed_dim)}
    beside = config.in_channels - latents[1]
    if beside:
        made["inpaint_latents" if beside == latents[1] + 1 else "control_latents"] = noise(1, beside, *latents[2:])
    return made


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "mmdit_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
    }


_T2V = Published(
    "alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
    MODEL,
    {
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "num_layers": 48,
        "mmdit_layers": 48,
        "time_embed_dim": 512,
        "text_embed_dim": 3584,
        "add_norm_text_encoder": True,
    },
    latents=(1, 16, 13, 64, 64),
    layers=48,
    heads=48,
    head_dim=64,
    grid=(13, 32, 32),
    text=256,
    toy=True,
)
_VIDEO = torch.linspace(0, 1, 9)[:, None, None].expand(1, 3, 9, 128, 128)
_RUN: Inputs = {"prompt": None, "guidance_scale": 5.0, **embeddings(7)}

TESTS = FamilyTests(
    family=EasyAnimate,
    cases={
        "easyanimate": Case(
            tiny_easyanimate,
            _RUN,
            (
                {"height": 96, "width": 160, "guidance_rescale": 0.5},
                {"num_frames": 5, "height": 112, "width": 80},
                embeddings(10, 4),
                {"guidance_scale": 1.0},
            ),
            one_each=True,
            text=JointText(TEXT, (TEXT,) * 4, {"prompt": None, **embeddings(6, 12)}),
        ),
        "easyanimate-inpaint": Case(tiny_easyanimate_inpaint, _RUN, ({"height": 96, "width": 160},)),
        "easyanimate-control": Case(
            tiny_easyanimate_control,
            _RUN,
            ({"control_video": _VIDEO},),
        ),
    },
    networks={MODEL: Network(_inputs, _toy, one_block={"num_layers": 1, "mmdit_layers": 1})},
    published=(
        _T2V,
        replace(
            _T2V,
            checkpoint="alibaba-pai/EasyAnimateV5.1-12b-zh-InP-diffusers",
            config={**_T2V.config, "in_channels": 33},
            latents=(1, 16, 13, 56, 72),
            grid=(13, 28, 36),
        ),
        replace(
            _T2V,
            checkpoint="alibaba-pai/EasyAnimateV5.1-12b-zh-Control-diffusers",
            config={**_T2V.config, "in_channels": 48},
            latents=(1, 16, 13, 84, 48),
            grid=(13, 42, 24),
        ),
    ),
    saved={
        "easyanimate": SavedCase(_with_text_encoder, size=64, frames=9, stand_ins={"encode_prompt": _encode_prompt}),
    },
    takes_lora=False,
    has_set_attn_processor=False,
)
