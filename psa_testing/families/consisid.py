"""ConsisID: a tiny random pipeline with 3 layers and 2 heads of 16, and the published transformer.

Its configuration is that of CogVideoX 5B's for images, which it was trained from, with the face modules' defaults
(transformer/config.json of feizhengcong/Ingredients, which was trained from it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import ConsisIDTransformer3DModel

# diffusers itself gives it only beside OpenCV, which draws the points of a face; nothing here has any.
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

from psa_diffusers.families.consisid import ConsisID
from psa_testing.cases import GUIDED, IMAGE, SMALL_TEXT, Case, ParallelCase, Ranks
from psa_testing.declaration import FamilyTests
from psa_testing.families import cogvideox
from psa_testing.full_size import Inputs, Latents, Network, Noise

# The face modules of a tiny model. The width of what cross-attention reads is two thirds of the model's.
FACE = {
    "is_train_face": True,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 8,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": 6,
    "LFE_vit_dim": 8,
    "LFE_depth": 2,
    "LFE_dim_head": 4,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 1,
    "LFE_num_querie": 3,
    "LFE_ff_mult": 1,
    "LFE_num_scale": 2,
}
FACE_TOKENS = 577


def tiny_consisid(heads: int = 2) -> ConsisIDPipeline:
    """Image to video as CogVideoX, and cross-attention to a face after every second block but the last."""
    parts = cogvideox.parts()
    torch.manual_seed(0)
    parts["transformer"] = ConsisIDTransformer3DModel(
        **{
            **cogvideox.TRANSFORMER,
            **FACE,
            "num_attention_heads": heads,
            "num_layers": 4,
            "in_channels": 8,
            "LFE_output_dim": 16 * heads * 2 // 3,
            "use_rotary_positional_embeddings": True,
        }
    ).eval()
    return ConsisIDPipeline(**parts)


def face(config: Mapping[str, Any], noise: Any, tokens: int) -> Inputs:
    """What face models make of an image, of the widths that a configuration says."""
    scales = range(config["LFE_num_scale"])
    return {
        "id_cond": noise(1, config["LFE_id_dim"]),
        "id_vit_hidden": [noise(1, tokens, config["LFE_vit_dim"]) for _ in scales],
    }


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    return {**cogvideox.inputs(config, latents, noise), **face(config, noise, noise.tokens(FACE_TOKENS))}


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**cogvideox.toy(config), **FACE, "LFE_output_dim": 2 * 32 * 2 // 3}


def _random_face() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return face(FACE, lambda *shape: torch.randn(shape, generator=generator), 5)


_RUN: Inputs = {**GUIDED, **SMALL_TEXT, "image": IMAGE, **_random_face()}
_FACE_KEYS = {"in_channels": 32, "is_train_face": True, "use_learned_positional_embeddings": True}

TESTS = FamilyTests(
    family=ConsisID,
    cases={
        "consisid": Case(
            tiny_consisid,
            _RUN,
            ({"height": 96, "width": 160}, {"use_dynamic_cfg": True, "num_frames": 5}),
            one_each=True,
        ),
    },
    networks={
        "ConsisIDTransformer3DModel": Network(
            _inputs,
            _toy,
            toy_latents=cogvideox.toy_latents,
            one_block={"num_layers": 1, "cross_attn_interval": 1},
            frames_first=True,
        ),
    },
    published=(
        replace(
            cogvideox.I2V_5B,
            checkpoint="BestWishYsh/ConsisID-preview",
            model="ConsisIDTransformer3DModel",
            config={**cogvideox.I2V_5B.config, **_FACE_KEYS},
            toy=True,
        ),
    ),
    parallel={"consisid": ParallelCase(Case(lambda: tiny_consisid(heads=4), _RUN), (Ranks(2),))},
)
