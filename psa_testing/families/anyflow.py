"""AnyFlow: a tiny random pipeline, and the published transformers.

Their configurations are Wan 2.1's, which `scripts/convert_anyflow_to_diffusers.py` of diffusers (3276d0a) starts from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from psa_diffusers.families.anyflow import AnyFlow
from psa_testing.cases import GUIDED, IMAGE, SIZES, SMALL_TEXT, TWO_PROMPTS, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.families import wan
from psa_testing.full_size import TOY_TOKENS, Inputs, Latents, Network, Noise, Published

MODEL = "AnyFlowTransformer3DModel"


def tiny_anyflow() -> AnyFlowPipeline:
    """Text to video, or a video's continuation; every step knows its own timestep and the next one."""
    torch.manual_seed(0)
    # Its norms are always across heads.
    config = {name: value for name, value in wan.TRANSFORMER.items() if name != "qk_norm"}
    parts = wan.parts(AnyFlowTransformer3DModel(**config))
    return AnyFlowPipeline(**{**parts, "scheduler": FlowMapEulerDiscreteScheduler(shift=5.0)})


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    frames = latents[1]
    return {
        "encoder_hidden_states": noise.text(512, config.text_dim),
        "timestep": noise.timestep(1, frames),
        "r_timestep": noise.timestep(1, frames) // 2,
    }


def _published(checkpoint: str, size: str, *, toy: bool = False) -> Published:
    made = wan.published(checkpoint, (1, 16, 21, 60, 104), (21, 30, 52), size, model=MODEL, toy=toy)
    config = {name: value for name, value in made.config.items() if name != "qk_norm"}
    return replace(made, config=config, latents=(1, 21, 16, 60, 104))


def _toy_latents(published: Published) -> Latents:
    frames, height, width = TOY_TOKENS
    return (1, frames, 16, 2 * height, 2 * width)


_RUN: Inputs = {**SMALL_TEXT, "guidance_scale": 1.0}

TESTS = FamilyTests(
    family=AnyFlow,
    cases={
        "anyflow": Case(
            tiny_anyflow,
            _RUN,
            (*SIZES, {**GUIDED, **TWO_PROMPTS}, {"num_inference_steps": 2, "use_mean_velocity": False}),
            one_each=True,
        ),
        "anyflow-continued": Case(tiny_anyflow, {**_RUN, "video": [IMAGE]}),
    },
    networks={MODEL: Network(_inputs, wan.toy, toy_latents=_toy_latents, frames_first=True)},
    published=(
        _published("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "1.3B", toy=True),
        _published("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", "14B"),
    ),
    saved={"anyflow": SavedCase(tiny_anyflow, size=64, frames=9)},
    has_set_attn_processor=False,
)
