"""The model families: where queries, keys, values, positions and text are in their attention."""

from __future__ import annotations

from typing import Any

from psa_diffusers.families.allegro import Allegro
from psa_diffusers.families.cogvideox import CogVideoX
from psa_diffusers.families.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.families.framepack import Framepack
from psa_diffusers.families.hunyuan_video import HunyuanVideo
from psa_diffusers.families.hunyuan_video15 import HunyuanVideo15
from psa_diffusers.families.ltx import LTXVideo
from psa_diffusers.families.mochi import Mochi
from psa_diffusers.families.skyreels_v2 import SkyReelsV2
from psa_diffusers.families.wan import Wan

__all__ = [
    "FAMILIES",
    "AttentionCall",
    "DenseOnlyError",
    "ModelFamily",
    "UnsupportedModelError",
    "find_family",
]

FAMILIES: tuple[type[ModelFamily], ...] = (
    Wan,
    HunyuanVideo,
    CogVideoX,
    HunyuanVideo15,
    LTXVideo,
    Mochi,
    SkyReelsV2,
    Framepack,
    Allegro,
)

# Video models of diffusers whose attention is not of the kind that can be made sparse here.
REASONS = {
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "LatteTransformer3DModel": "it attends space and time apart, in short sequences",
    "Kandinsky5Transformer3DModel": "it has sparse attention of its own",
    "LTX2VideoTransformer3DModel": "its layers attend video and audio through gates",
    "WanAnimate2Transformer3DModel": "its attention keeps the keys of earlier chunks",
}


class UnsupportedModelError(ValueError):
    """The pipeline's transformer is of no family that Pyramid Sparse Attention is made for."""


def find_family(transformer: Any) -> type[ModelFamily]:
    """The family of a transformer.

    Raises:
        UnsupportedModelError: names the transformer's class, why it is not supported, and what is.
    """
    name = type(transformer).__name__
    for family in FAMILIES:
        if name in family.transformers:
            return family
    reason = REASONS.get(name, "no family in psa_diffusers.families describes its attention")
    supported = ", ".join(family.name for family in FAMILIES)
    raise UnsupportedModelError(f"{name} is not supported, because {reason}; supported: {supported}")
