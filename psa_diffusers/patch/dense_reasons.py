"""Why a layer that the preset wants sparse is dense: the reasons in order, each told once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from psa_diffusers.families import AttentionCall, ModelFamily
from psa_diffusers.patch.sites import Site
from psa_diffusers.patch.token_order import Grid


class PSAFallbackWarning(UserWarning):
    """Calls run dense although the preset asked for sparse attention."""


class PSAFallbackError(RuntimeError):
    """With `strict=True`: a call would have run dense although the preset asked for sparse attention."""


class Fallbacks:
    """Tells of each reason once, or raises `PSAFallbackError` at the first."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._told: set[str] = set()

    def warn_or_raise(self, reason: str) -> None:
        """Tell that attention is dense against the preset.

        Raises:
            PSAFallbackError: instead of the warning, with `strict`.
        """
        if self._strict:
            raise PSAFallbackError(f"strict: attention would be dense: {reason}")
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"attention is dense: {reason}", PSAFallbackWarning, stacklevel=4)


@dataclass(frozen=True)
class Facts:
    """What is known of a layer before it is called.

    Attributes:
        site: the layer's.
        processor: what its module has now.
        kind: the class of the patch's processor.
        transformer: name of its transformer.
        left_out: whether the patch was set on the other expert alone.
        unknown_step: why the denoising step is not known; None if it is.
        shared: why no layer can be sparse among these ranks; None if they can.
        grid: None where the model was not told.
    """

    site: Site
    processor: Any
    kind: type
    transformer: str
    left_out: bool
    unknown_step: str | None
    shared: str | None
    grid: Grid | None


def not_patched(facts: Facts) -> str | None:
    """The expert of two that was left out, as `pipe.transformer.set_attn_processor` does with the second."""
    return left_out(facts.transformer, facts.kind) if facts.left_out else None


def left_out(transformer: str, kind: type) -> str:
    """What to do for an expert that was left out."""
    return (
        f"pipe.{transformer} was not patched; call pipe.{transformer}.set_attn_processor(processor) with the same "
        f"{kind.__name__}, or patch both experts with apply_psa(pipe)"
    )


def replaced(facts: Facts) -> str | None:
    """Another processor was set since, as CogVideoX's `fuse_qkv_projections` does."""
    found = facts.processor
    if found is facts.site.patch.processor():
        return None
    return f"another processor, {type(found).__name__}, replaced {facts.kind.__name__}; patch again after such a change"


def unknown_step(facts: Facts) -> str | None:
    return facts.unknown_step


def not_imitated(facts: Facts) -> str | None:
    """A processor of the user's own, which goes on serving its module."""
    return facts.site.not_imitated


def not_shareable(facts: Facts) -> str | None:
    return facts.shared


def unknown_grid(facts: Facts) -> str | None:
    if facts.grid is not None:
        return None
    return "this pipeline does not tell the transformer the video's frames, height and width"


def too_short(facts: Facts) -> str | None:
    layer, video = facts.site.layer, math.prod(facts.grid or ())
    if layer is None or video >= layer.preset.min_tokens:
        return None
    return f"the sequence of {video} tokens is shorter than min_tokens={layer.preset.min_tokens}"


def needs_gradients(facts: Facts) -> str | None:
    return "gradients are enabled, and sparse attention is for inference only" if torch.is_grad_enabled() else None


BEFORE_THE_FORWARD: tuple[Callable[[Facts], str | None], ...] = (
    not_patched,
    replaced,
    unknown_step,
    not_imitated,
    not_shareable,
    unknown_grid,
    too_short,
    needs_gradients,
)


def dense_reason(facts: Facts) -> str | None:
    """Why a layer cannot be sparse, as far as is known before the forward; None if it can."""
    return next((reason for ask in BEFORE_THE_FORWARD if (reason := ask(facts))), None)


def call_reason(family: type[ModelFamily], grid: Grid, call: AttentionCall) -> str | None:
    """Why one call of a layer cannot be sparse, which only its tensors tell; None if it can."""
    tokens, video = call.hidden_states.shape[1], math.prod(grid)
    if tokens < video or (tokens > video and not family.history):
        frames, height, width = grid
        return f"the sequence has {tokens} tokens, but the video's grid is {frames} x {height} x {width}"
    return None
