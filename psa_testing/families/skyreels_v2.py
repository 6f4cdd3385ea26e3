"""SkyReels V2: tiny random pipelines, and the published transformers.

Their configurations are those of `scripts/convert_skyreelsv2_to_diffusers.py` of diffusers (58eb52c).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from psa_diffusers.families.skyreels_v2 import SkyReelsV2
from psa_testing.cases import GUIDED, SIZES, SMALL_TEXT, TWO_PROMPTS, Case
from psa_testing.declaration import FamilyTests
from psa_testing.families import wan
from psa_testing.full_size import Inputs, Latents, Network, Noise


def _parts() -> dict[str, Any]:
    torch.manual_seed(0)
    parts = wan.parts(SkyReelsV2Transformer3DModel(**wan.TRANSFORMER))
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=8.0, use_flow_sigmas=True
    )
    return parts


def tiny_skyreels_v2() -> SkyReelsV2Pipeline:
    """Text to video."""
    return SkyReelsV2Pipeline(**_parts())


def tiny_skyreels_v2_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    """Diffusion forcing: every frame has a timestep and a scheduler of its own."""
    return SkyReelsV2DiffusionForcingPipeline(**_parts())


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    inputs = wan.inputs(config, latents, noise)
    if config.inject_sample_info:  # diffusion forcing: a timestep a frame, and whether it is 24 frames a second
        inputs |= {"timestep": noise.timestep(1, latents[2]), "enable_diffusion_forcing": True, "fps": [1]}
    return inputs


MODEL = "SkyReelsV2Transformer3DModel"
_LATENTS, _540P = (1, 16, 25, 68, 120), (25, 34, 60)

TESTS = FamilyTests(
    family=SkyReelsV2,
    cases={
        "skyreels-v2": Case(
            tiny_skyreels_v2, {**GUIDED, **SMALL_TEXT}, (SIZES[1], TWO_PROMPTS), one_each=True, fuses=True
        ),
        "skyreels-v2-forcing": Case(tiny_skyreels_v2_forcing, {**GUIDED, **SMALL_TEXT, "num_frames": 9}),
    },
    networks={MODEL: Network(_inputs, wan.toy)},
    published=(
        wan.published("Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", _LATENTS, _540P, "14B", model=MODEL),
        wan.published(
            "Skywork/SkyReels-V2-T2V-14B-720P-Diffusers", (1, 16, 31, 90, 160), (31, 45, 80), "14B", model=MODEL
        ),
        wan.published(
            "Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
            (1, 36, 25, 68, 120),
            _540P,
            "14B",
            wan.IMAGE_CONFIG,
            model=MODEL,
        ),
        wan.published(
            "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
            _LATENTS,
            _540P,
            "1.3B",
            {"inject_sample_info": True},
            model=MODEL,
            toy=True,
        ),
    ),
)
