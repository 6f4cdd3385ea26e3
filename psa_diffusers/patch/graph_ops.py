"""Sparse attention inside compiled transformer blocks.

All layers of a kind share one graph, at all steps, so a graph may hold neither the layer nor the step. What depends on
them (statistics, kept lists, text lengths, which kernels run) is behind two operators that `torch.compile` does not
look into, and they are told the layer by a tensor: a number would be compiled in. Whether a layer is dense or sparse is
decided before each forward, and is the one thing that graphs are chosen by.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from psa_diffusers.presets import Preset, TokenOrder
from psa_kernels import AttentionSpec

ATTRIBUTE = "psa_site"
NO_STEP = "the denoising step is unknown, because the pipeline's scheduler has no timesteps"

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()


class Stateful(Protocol):
    """What the operators call: the part of the processor that stays outside of graphs."""

    def note_dense(self, layer: Layer, reason: str | None) -> None: ...

    def attend_behind_graph(
        self,
        site: Site,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor | None,
        text: int,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Layer:
    """One video self-attention; `spec` is None where the preset keeps it dense, `order` says what its blocks hold."""

    name: str
    transformer: str
    preset: Preset
    spec: AttentionSpec | None
    order: TokenOrder


class Site:
    """An attention module of the pipeline.

    Attributes:
        owner: the processor that made this.
        original: the processor that the module had before.
        transformer: which of the pipeline's transformers it is in.
        layer: the layer that it is; None for other attention, as that to text.
        number: 0-dim tensor on the CPU, which names the site to the operators.
        sparse: which graph a compiled block takes for this module in the current forward.
        reason: why it is the dense one, if the preset wants it sparse. An eager block goes by these two as well.
        ours: whether `original` is not to be asked in the current forward, dense or not.
    """

    def __init__(self, owner: Stateful, original: Any, transformer: str, layer: Layer | None) -> None:
        self.owner = owner
        self.original = original
        self.transformer = transformer
        self.layer = layer
        self.sparse = False
        self.reason: str | None = NO_STEP
        self.ours = False
        number = next(_numbers)
        with torch.inference_mode(False), torch.device("cpu"):
            self.number = torch.tensor(number)
        _sites[number] = self


def site_of(attn: torch.nn.Module) -> Site | None:
    """What `publish` noted on a module; readable inside a graph, unlike a dictionary of modules."""
    return getattr(attn, ATTRIBUTE, None)


def publish(attn: torch.nn.Module, site: Site) -> None:
    """Note on a module which site it is."""
    if site_of(attn) is not site:
        setattr(attn, ATTRIBUTE, site)


def withdraw(attn: torch.nn.Module, site: Site) -> None:
    """Undo `publish`, unless another processor has since noted its own."""
    if site_of(attn) is site:
        delattr(attn, ATTRIBUTE)


# The argument is said to be changed, because an operator without effect and result would be dropped from the graph.
@torch.library.custom_op("psa_diffusers::note_dense", mutates_args=("site",), schema="(Tensor(a!) site) -> ()")
def note_dense(site: torch.Tensor) -> None:
    """Note that a layer is dense in this forward."""
    found = _sites[int(site)]
    found.owner.note_dense(found.layer, found.reason)


@torch.library.custom_op(
    "psa_diffusers::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor site, int text, bool text_last) -> (Tensor, Tensor)",
)
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    site: torch.Tensor,
    text: int,
    text_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of one layer in this forward.

    Args:
        q, k, v: `[B, N, H, D]`, of video and text.
        mask: the attention mask as the model made it.
        site: `Site.number`.
        text: number of text tokens, padding included.
        text_last: whether they are the last ones.

    Returns:
        The attention output, contiguous: of the text tokens if they are the last ones, else of none, and before that
        of the others.
    """
    found = _sites[int(site)]
    head, tail = found.owner.attend_behind_graph(found, q, k, v, mask, text)
    return head.contiguous(), tail.contiguous()


@attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    site: torch.Tensor,
    text: int,
    text_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, width = q.shape
    tail = text if text_last else 0
    return q.new_empty(batch, tokens - tail, heads, width), q.new_empty(batch, tail, heads, width)
