"""The reasons why a layer that the preset wants sparse is dense, in order; each gives one warning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from psa_diffusers.patch.sites import LayerSite
from psa_diffusers.patch.token_order import Grid


class PSAFallbackWarning(UserWarning):
    """Attention runs dense although the preset wants it sparse, or is slower than the preset wants in another way."""


class PSAFallbackError(RuntimeError):
    """Raised instead of a `PSAFallbackWarning` with `strict=True`."""


class Fallbacks:
    """Warns once of each reason, or raises with `strict`."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._told: set[str] = set()

    def warn_or_raise(self, reason: str) -> None:
        """Warn that attention is dense although the preset wants it sparse.

        Raises:
            PSAFallbackError: instead of the warning, with `strict`.
        """
        if self._strict:
            raise PSAFallbackError(f"strict: attention would be dense: {reason}")
        self._warn_once(f"attention is dense: {reason}")

    def tell(self, what: str) -> None:
        """Warn that a setting of the preset has no effect.

        Raises:
            PSAFallbackError: instead of the warning, with `strict`.
        """
        if self._strict:
            raise PSAFallbackError(f"strict: {what}")
        self._warn_once(what)

    def remark(self, what: str) -> None:
        """Warn of what may be slower than it need be; results are as they should be, so `strict` takes it too."""
        self._warn_once(what)

    def _warn_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(what, PSAFallbackWarning, stacklevel=5)


class Facts(NamedTuple):
    """What is known of a layer before it is called.

    Attributes:
        processor: the processor that its module has now.
        mine: the processor that the patch set there.
        left_out: whether the patch was set only on the pipeline's other transformer.
        unknown_step: why the denoising step is not known.
        unshared: why no layer can be sparse among these ranks.
        refused: why the family lets no layer be sparse in this forward.
        grid: the token grid; None if the pipeline does not tell the transformer.
    """

    site: LayerSite
    processor: Any
    mine: Any
    left_out: bool
    unknown_step: str | None
    unshared: str | None
    refused: str | None
    grid: Grid | None


def left_out(facts: Facts) -> str | None:
    """The patch was set only on the pipeline's other transformer."""
    return tell_left_out(facts.site.patch.name) if facts.left_out else None


def tell_left_out(transformer: str) -> str:
    """The line that says what to do for a transformer that was left out."""
    return (
        f"pipe.{transformer} was not patched; call pipe.{transformer}.set_attn_processor(processor) with the same "
        "PSAProcessor, or patch all transformers with apply_psa(pipe)"
    )


def replaced(facts: Facts) -> str | None:
    """Another processor was set since, as CogVideoX's `fuse_qkv_projections` does."""
    if facts.processor is facts.mine:
        return None
    name = type(facts.processor).__name__
    return f"another processor, {name}, replaced PSAProcessor; patch again after such a change"


def unknown_grid(facts: Facts) -> str | None:
    if facts.grid is not None:
        return None
    return "this pipeline does not tell the transformer the video's frames, height and width"


def too_short(facts: Facts) -> str | None:
    video, least = math.prod(facts.grid or ()), facts.site.layer.preset.fewest_tokens
    return f"the sequence of {video} tokens is shorter than min_tokens={least}" if video < least else None


def needs_gradients(facts: Facts) -> str | None:
    return "gradients are enabled, and sparse attention is for inference only" if torch.is_grad_enabled() else None


REASONS: tuple[Callable[[Facts], str | None], ...] = (
    left_out,
    replaced,
    lambda facts: facts.unknown_step,
    lambda facts: facts.site.not_imitated,
    lambda facts: facts.unshared,
    lambda facts: facts.refused,
    unknown_grid,
    too_short,
    needs_gradients,
)


# Dense attention needs no blocks, and for short sequences the kernel decides itself.
FULL_REASONS = tuple(ask for ask in REASONS if ask not in (unknown_grid, too_short))


def dense_reason(facts: Facts) -> str | None:
    """Why a layer cannot be sparse, as far as is known before the forward; None if it can."""
    return next((reason for ask in REASONS if (reason := ask(facts))), None)


def can_be_full(facts: Facts) -> bool:
    """Whether the operator can compute a layer that the preset keeps dense."""
    return not any(ask(facts) for ask in FULL_REASONS)
