"""One call of the operator, checked and laid out once, before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch

from psa_kernels import known_calls
from psa_kernels.blocks import block_count
from psa_kernels.causal.layout import CausalLayout
from psa_kernels.heads import group_size, key_heads
from psa_kernels.layout import TokenLayout, make_layout
from psa_kernels.lists import AttentionStats, BlockLists, list_width
from psa_kernels.spec import AttentionSpec

# PyTorch calls 8 bits floating point too, but has no arithmetic for them.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Call:
    """What a backend is asked to compute. `make_call` makes it, so backends need not check it.

    Attributes:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, in the order of the model; Hq is a multiple of Hkv.
        layout: where text and video stand among the tokens; in a causal call, among the keys.
        spec: what to compute.
        scale: factor on the dot products.
        causal: None, or which keys lie in the past of which query blocks.
        answers: what backends worked out from shapes and settings, shared by all calls that have the same ones.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    spec: AttentionSpec
    scale: float
    causal: CausalLayout | None = None
    answers: dict[Any, Any] = field(default_factory=dict)

    @property
    def query_blocks(self) -> int:
        if self.causal is not None:
            return len(self.causal.rows)
        return block_count(self.layout.video_queries, self.spec.block_query)

    @property
    def key_blocks(self) -> int:
        return block_count(self.layout.video_keys, self.spec.block_key)

    @property
    def dense_work(self) -> int:
        """Floating point operations of dense attention over the same tensors."""
        return 4 * self.q.shape.numel() * self.k.shape[1]

    def of_heads(self, heads: slice) -> Call:
        """The same call for some neighbouring query heads; heads that share keys must not be split."""
        of_keys = key_heads(heads, group_size(self.q, self.k))
        q, k, v = self.q[:, :, heads], self.k[:, :, of_keys], self.v[:, :, of_keys]
        answers = self.answers.setdefault(("heads", heads.start, heads.stop), {})
        return Call(q, k, v, self.layout, self.spec, self.scale, self.causal, answers)

    def no_lists(self) -> BlockLists:
        """The lists of a call without video queries or without video keys."""
        pairs = self.q.shape[0], self.q.shape[2], self.query_blocks, self.key_blocks
        return BlockLists.from_levels(
            torch.zeros(pairs, dtype=torch.int64, device=self.q.device), len(self.spec.levels), None, self.spec.levels
        )

    def check_lists(self, lists: BlockLists) -> BlockLists:
        """Check lists, and return them contiguous, as the kernels read them.

        Their entries are looked at in causal calls alone, where a block that is not past must not be read.

        Raises:
            ValueError: they were made for other shapes or, as far as they know their own, other pooling factors; or a
                row of a causal call lists a block that is not past.
            TypeError: they are something else.
        """
        if not isinstance(lists, BlockLists):
            raise TypeError(f"lists: expected BlockLists or None, got {type(lists).__name__}")
        found = lists.ids.shape, lists.key_blocks, lists.counts.shape, lists.pooling
        if self.answers.get("kind of lists") != found:
            self._check_kind(lists)
            self.answers["kind of lists"] = found
        if self.causal is not None:
            place = torch.arange(lists.ids.shape[3], device=lists.ids.device)
            attended = place < lists.counts.sum(-1, keepdim=True)
            candidates = [self.causal.candidates(row) for row in self.causal.rows]
            past = lists.ids < torch.tensor(candidates, device=lists.ids.device)[:, None]
            wrong = (attended & ~past).any(-1).any(1).any(0)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(f"lists: made for another call: row {row} lists blocks that are not past")
        return lists if lists.ids.is_contiguous() and lists.counts.is_contiguous() else lists[:]

    def _check_kind(self, lists: BlockLists) -> None:
        rows, key_blocks = (self.q.shape[0], self.q.shape[2], self.query_blocks), self.key_blocks
        width, levels = list_width(self.spec, key_blocks), len(self.spec.levels)
        found = *lists.ids.shape[:3], lists.key_blocks, *lists.counts.shape
        if found != (*rows, key_blocks, *rows, levels) or not width <= lists.ids.shape[3] <= key_blocks:
            raise ValueError(
                f"lists: made for another call: ids {tuple(lists.ids.shape)} of {lists.key_blocks} key blocks and "
                f"counts {tuple(lists.counts.shape)}, expected {(*rows, width)} of {key_blocks} and {(*rows, levels)}"
            )
        if lists.pooling not in (None, self.spec.levels):
            raise ValueError(f"lists: made for levels={lists.pooling}, expected those of the spec, {self.spec.levels}")

    def stats(self, lists: BlockLists, implementation: str) -> AttentionStats:
        """What a call with these lists attends."""
        if self.causal is None:
            return AttentionStats.from_lists(lists, self.spec, implementation)
        pairs, diagonal = self.causal.pairs, self.causal.diagonal_blocks
        return AttentionStats(lists.to_count(), pairs, self.spec, implementation, diagonal)


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec,
    text_before: int = 0,
    text_after: int = 0,
    permutation: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Call:
    """Check the arguments of `psa_attention`, whose docstring explains them and the errors."""
    key = None
    if causal is False:  # what is no bool goes to the checks
        key = known_calls.key_of(q, k, v, spec, text_before, text_after, permutation, scale)
    try:
        known = None if key is None else known_calls.find(key, permutation)
    except TypeError:  # an argument that cannot be hashed, which the checks name
        known = key = None
    if known is not None:
        layout, scale, answers = known
        return Call(q, k, v, layout, spec, scale, None, answers)
    call = _checked_call(q, k, v, spec, text_before, text_after, permutation, scale, causal)
    if key is not None:
        known_calls.keep(key, call.layout, call.scale, call.answers)
    return call


def _checked_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, text_before: int, text_after: int,
    permutation: torch.Tensor | None, scale: float | None, causal: bool,
) -> Call:  # fmt: skip
    """`make_call` for a call that is unlike all that were checked before."""
    if not isinstance(spec, AttentionSpec):
        raise TypeError(f"spec: expected an AttentionSpec, got {type(spec).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.dtype not in DTYPES or not x.numel():
            raise ValueError(
                f"{name}: expected a non-empty floating point tensor [batch, tokens, heads, head_dim] of 16, 32 or 64 "
                f"bits, got {x.dtype} of shape {tuple(x.shape)}"
            )
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}: expected a last stride of 1, got strides {x.stride()}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires a gradient, but psa_attention is forward only; use torch.no_grad()")
    (batch, query_tokens, heads, head_dim), (_, key_tokens, kv_heads, _) = q.shape, k.shape
    if k.shape != v.shape or (batch, head_dim) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected "
            "[B, Nq, Hq, D] and twice [B, Nk, Hkv, D]"
        )
    if heads % kv_heads:
        raise ValueError(
            f"q of {heads} heads and k of {kv_heads} do not fit: expected as many heads of queries as of keys, or a "
            "multiple"
        )
    scale = head_dim**-0.5 if scale is None else _checked_scale(scale)
    if not isinstance(causal, bool):
        raise TypeError(f"causal={causal!r}: expected True or False")
    if causal:
        _check_causal(query_tokens, key_tokens, spec, permutation)
        layout = make_layout(key_tokens, key_tokens, text_before, text_after, None)
        past = CausalLayout(*layout.counts, key_tokens - query_tokens, spec.block_query, spec.block_key)
        return Call(q, k, v, replace(layout, video_queries=past.video_queries), spec, scale, past)
    for name in ("keep_first", "keep_last"):
        if getattr(spec, name):
            raise ValueError(f"{name}={getattr(spec, name)}: expected 0 without causal=True")
    return Call(q, k, v, make_layout(query_tokens, key_tokens, text_before, text_after, permutation), spec, scale)


def _checked_scale(scale: object) -> float:
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale={scale!r}: expected a number or None")
    try:
        number = float(scale)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"scale={scale!r}: expected a finite number or None")
    return number


def _check_causal(query_tokens: int, key_tokens: int, spec: AttentionSpec, permutation: torch.Tensor | None) -> None:
    if key_tokens < query_tokens:
        raise ValueError(f"causal=True: expected no fewer keys than queries, got {key_tokens} and {query_tokens}")
    if permutation is not None:
        raise ValueError("causal=True: expected permutation=None, tokens in the order in which they follow each other")
    if spec.block_query % spec.block_key:
        raise ValueError(
            f"causal=True: expected a block_query that is a multiple of block_key={spec.block_key}, got "
            f"{spec.block_query}"
        )
    if spec.precision != "native":
        raise ValueError(f"causal=True: expected precision='native', got {spec.precision!r}")
