"""The model families: where queries, keys, values, positions and text are in their attention."""

from __future__ import annotations

from typing import Any

from psa_diffusers.models.allegro import Allegro
from psa_diffusers.models.cogvideox import CogVideoX
from psa_diffusers.models.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.models.framepack import Framepack
from psa_diffusers.models.hunyuan_video import HunyuanVideo
from psa_diffusers.models.hunyuan_video15 import HunyuanVideo15
from psa_diffusers.models.ltx import LTXVideo
from psa_diffusers.models.mochi import Mochi
from psa_diffusers.models.skyreels_v2 import SkyReelsV2
from psa_diffusers.models.wan import Wan

__all__ = ["FAMILIES", "AttentionCall", "DenseOnlyError", "ModelFamily", "UnsupportedModelError", "find_family"]

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


class UnsupportedModelError(ValueError):
    """The pipeline's transformer is of no family that Pyramid Sparse Attention is made for."""


def find_family(transformer: Any) -> type[ModelFamily]:
    """The family of a transformer.

    Raises:
        UnsupportedModelError: names the transformer's class and what is supported.
    """
    for family in FAMILIES:
        if type(transformer).__name__ in family.transformers:
            return family
    supported = ", ".join(f"{family.name} ({', '.join(family.transformers)})" for family in FAMILIES)
    raise UnsupportedModelError(f"{type(transformer).__name__} is not supported; supported: {supported}")
