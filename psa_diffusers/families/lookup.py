"""From a transformer's class to its family, or to the reason why it has none."""

from __future__ import annotations

from collections.abc import Sequence

from psa_diffusers.families.family import ModelFamily, is_of_diffusers

_APART = "its layers attend within one frame or along time, never over the whole video"
# Video models of diffusers, and what is named as one, whose attention cannot be made sparse here.
REASONS = {
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "LatteTransformer3DModel": "it attends space and time apart, in short sequences",
    "Cosmos3OmniTransformer": "its tokens are packed without a batch axis, which no family describes yet",
    "WanAnimate2Transformer3DModel": "each of its video tokens also attends, from a cache, the reference tokens of "
    "its own frame and of no other",
    "AnyFlowFARTransformer3DModel": "its attention is causal from chunk to chunk, with a cache of earlier keys",
    "HeliosTransformer3DModel": "it makes a video in short chunks, and scales the keys of the frames before them",
    "Kandinsky6SRTransformer3DModel": "its attention is always its own sparse one, within tiles of the video",
    "SanaWMTransformer3DModel": "most of its self-attention is linear already, and none of it has a processor",
    "SanaWMLTX2RefinerTransformer3DModel": "each of its chunks attends a cache of the keys of earlier ones",
    "UNet3DConditionModel": _APART,
    "UNetMotionModel": _APART,
    "UNetSpatioTemporalConditionModel": _APART,
    "I2VGenXLUNet": _APART,
    "JoyImageEditTransformer3DModel": "it makes images",
    "JoyImageEditPlusTransformer3DModel": "it makes images",
}


class UnsupportedModelError(ValueError):
    """The pipeline's transformer is of no family that Pyramid Sparse Attention is made for."""


def family_of(kind: type, families: Sequence[type[ModelFamily]]) -> type[ModelFamily]:
    """The family of a class, by the nearest class of diffusers among its bases that has a family or a reason.

    Raises:
        UnsupportedModelError: names the class, why it is not supported, and what is.
    """
    known = {name: family for family in families for name in family.transformers}
    reason = "no family in psa_diffusers.families describes its attention"
    for base in kind.__mro__:
        name = base.__name__
        if name in known and not is_of_diffusers(base):
            # Whatever has the name of a known one need not have its layers, nor its forward the same arguments.
            reason = f"it is of {base.__module__}, and only that of diffusers is known"
            break
        if name in known and getattr(kind, "forward", None) is not getattr(base, "forward", None):
            # Its arguments are read by name, and its tokens may stand in another order, or mean something else.
            reason = f"its forward is not that of {name}, which it is derived from"
            break
        if name in known:
            return known[name]
        if name in REASONS:
            reason = REASONS[name]
            break
    supported = ", ".join(family.name for family in families)
    raise UnsupportedModelError(f"{kind.__name__} is not supported, because {reason}; supported: {supported}")
