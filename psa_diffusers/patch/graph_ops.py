"""Sparse attention inside compiled transformer blocks.

All layers of a kind share one graph, at all steps, so a graph must not contain the layer or the step. What depends on
them (statistics, kept lists, text lengths, which kernels run, what ranks exchange) is behind operators that
`torch.compile` does not look into. A tensor tells them the layer, because a number would be compiled in. Whether a
layer is dense or sparse, and whether ranks share it, is decided before each forward, and graphs are chosen by that
alone.

For the same reason a CUDA graph that PyTorch captures by itself must not contain these operators: a replay runs no
Python, so it would attend as the captured layer did at the captured step. (To capture by hand, state the step, see
`stated_step`.) A tag on the operators says so, and `mode="reduce-overhead"` then captures only what is around them. An
older PyTorch without that tag captures no graph that has an argument on the CPU, which the layer's number is.
"""

from __future__ import annotations

from typing import Any

import torch

from psa_diffusers.patch.parallel.exchange import PARTS
from psa_diffusers.patch.sites import site_numbered

OTHER_THREAD = (
    "the graph of its block was chosen for a forward of another thread at another step; give each thread a compiled "
    "transformer of its own, or let them take turns"
)
_NOT_CAPTURED: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


# Declared to change its argument, because an operator without effect and result would be dropped from the graph.
@torch.library.custom_op(
    "psa_diffusers::note_dense", mutates_args=("site",), schema="(Tensor(a!) site) -> ()", **_NOT_CAPTURED
)
def note_dense(site: torch.Tensor) -> None:
    """Note that a layer is dense in this forward."""
    found = site_numbered(site)
    forward = found.patch.forward
    route = forward.routes[found.layer.name]
    found.patch.attention.note_dense(forward, found.layer, OTHER_THREAD if route.sparse else route.reason)


# Declared to change its arguments: the site for the same reason, and because all ranks must exchange the parts in the
# same order; what is exchanged, because it is read until `attend`, which must be given this memory and not a copy.
@torch.library.custom_op(
    "psa_diffusers::begin_exchange",
    mutates_args=("site", "x"),
    schema="(Tensor(a!) site, int text, str part, Tensor(b!) x) -> ()",
    **_NOT_CAPTURED,
)
def begin_exchange(site: torch.Tensor, text: int, part: str, x: torch.Tensor) -> None:
    """Begin to exchange a part of a layer's projections with the ranks that share this forward.

    Args:
        site: `LayerSite.number`.
        text: number of text tokens, padding included.
        part: one of `exchange.PARTS`, of which the first one begins a call.
        x: `[B, N, H, D]`.
    """
    found = site_numbered(site)
    if part == PARTS[0]:
        found.exchange = found.patch.attention.exchange(found.patch.forward.share, text, x.device)
    found.exchange.begin(part, x)


@torch.library.custom_op(
    "psa_diffusers::attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor site, int text, bool text_last) -> (Tensor, Tensor)",
    **_NOT_CAPTURED,
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
        site: `LayerSite.number`.
        text: number of text tokens, padding included.
        text_last: whether the text tokens are the last ones.

    Returns:
        The attention output in two parts, contiguous: of all tokens before text that stands last, and of that text. The
        second is empty if text is not last.
    """
    found = site_numbered(site)
    exchange, found.exchange = found.exchange, None
    forward = found.patch.forward
    layer = forward.at_step(found.layer)
    head, tail = found.patch.attention.attend(forward, layer, (q, k, v), mask, text, exchange)
    head, tail = head.contiguous(), tail.contiguous()
    # Results of an operator may share no memory.
    shared = head.untyped_storage().data_ptr() == tail.untyped_storage().data_ptr()
    return head, tail.clone() if shared else tail


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
