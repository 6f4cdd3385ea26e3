"""What follows from the shapes and settings of a call alone: worked out at the first such call, and kept."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch

from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec

# A pipeline makes calls of few shapes: its layers are alike.
KEPT_CALLS = 64

_Answer = TypeVar("_Answer")

_known: OrderedDict[tuple, KnownCall] = OrderedDict()


class KnownCall(NamedTuple):
    """What is known of all calls that are like one that passed the checks.

    Attributes:
        layout: of the call, without its permutation, which must not be kept alive.
        scale: factor on the dot products.
        answers: what backends worked out from shapes and settings, by keys of their own.
        permutation: None, or a weak reference to the permutation, its address, and how often it had been written to.
        short: the permutation in 32 bits, for kernels.
    """

    layout: TokenLayout
    scale: float
    answers: dict[Any, Any]
    permutation: tuple[weakref.ref, int, int] | None
    short: torch.Tensor | None


def key_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, text_before: int, text_after: int,
    permutation: torch.Tensor | None, scale: float | None,
) -> tuple | None:  # fmt: skip
    """All that the checks of a call read, except the entries of its permutation; None for a call to be checked anew.

    A call is checked anew if a gradient may be asked for, on a CPU (where kernels and permutations are judged at each
    call), if a tensor is none or of a subclass, if its permutation does not count writes, or if a number of tokens is
    no int.
    """
    if not (type(q) is type(k) is type(v) is torch.Tensor) or q.is_cpu:
        return None
    if q.requires_grad or k.requires_grad or v.requires_grad or type(text_before) is not int:
        return None
    if type(text_after) is not int:
        return None
    if permutation is not None and (type(permutation) is not torch.Tensor or permutation.is_inference()):
        return None
    return (
        q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype,
        v.device, spec, text_before, text_after, scale, None if permutation is None else id(permutation),
    )  # fmt: skip


def find(key: tuple, permutation: torch.Tensor | None) -> tuple[TokenLayout, float, dict[Any, Any]] | None:
    """Layout, scale and answers of a call like an earlier one, if there was one."""
    known = _known.get(key)
    if known is None:
        return None
    if permutation is None or known.permutation is None:
        return known.layout, known.scale, known.answers
    alive, address, version = known.permutation
    # Another tensor may have got the id of one that is gone.
    if (address, version) != (permutation.data_ptr(), permutation._version) or alive() is not permutation:
        return None
    plain = known.layout
    layout = TokenLayout(plain.text_before, plain.text_after, plain.video_queries, plain.video_keys, permutation)
    layout.__dict__["short_permutation"] = known.short
    return layout, known.scale, known.answers


def keep(key: tuple, layout: TokenLayout, scale: float, answers: dict[Any, Any]) -> None:
    """Remember a call that passed the checks, and forget the oldest ones beyond `KEPT_CALLS`."""
    permutation = layout.permutation
    of_permutation = None
    if permutation is not None:
        of_permutation = weakref.ref(permutation), permutation.data_ptr(), permutation._version
    plain = TokenLayout(layout.text_before, layout.text_after, layout.video_queries, layout.video_keys)
    _known[key] = KnownCall(plain, scale, answers, of_permutation, layout.short_permutation)
    while len(_known) > KEPT_CALLS:
        _known.popitem(last=False)


def recall(answers: dict[Any, Any] | None, key: Hashable, make: Callable[[], _Answer]) -> _Answer:
    """What `make` returns, asked once for all calls with these answers; every time where there are none to add to.

    Args:
        key: a name, and what shapes, strides and settings of the call leave open.
    """
    if answers is None:
        return make()
    found = answers.get(key)
    if found is None:
        found = answers[key] = make()
    return found
