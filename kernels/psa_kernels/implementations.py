"""Which implementations of the operator there are, and which one a call gets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from psa_kernels.allocation import reference as allocation
from psa_kernels.blocks import block_count
from psa_kernels.importance import reference as importance
from psa_kernels.layout import TokenLayout
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid import reference as pyramid
from psa_kernels.sparse import reference as sparse
from psa_kernels.spec import AttentionSpec

IMPLEMENTATIONS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Implementation:
    """The two halves of the operator, and the pyramid that both may use.

    Attributes:
        name: one of `IMPLEMENTATIONS` but `auto`.
        build_pyramid: `(k, v, layout, spec, selects)`; `selects` says whether `select` will be given the result. None
            from an implementation that pools head by head inside `attend`.
        select: `(q, k, layout, spec, scale, pyramid or None)` to the lists.
        attend: `(q, k, v, pyramid, lists, layout, spec, scale)` to the output, in which the rows of text queries are
            not set.
    """

    name: str
    build_pyramid: Callable[..., object]
    select: Callable[..., BlockLists]
    attend: Callable[..., torch.Tensor]


def choose(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec, wanted: str) -> Implementation:
    """The implementation of one call.

    `auto` takes the reference on every device as long as the kernels have not been measured against it on a GPU.

    Args:
        wanted: one of `IMPLEMENTATIONS`.

    Raises:
        ValueError: the wanted implementation cannot serve the call.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={wanted!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if wanted != "triton":
        return _reference()
    obstacle = why_not_triton(q, k, layout, spec)
    if obstacle is not None:
        raise ValueError(f"implementation='triton': {obstacle}")
    return _triton()


def why_not_triton(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, spec: AttentionSpec) -> str | None:
    """The reason why the Triton kernels cannot serve a call, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    # On a CPU they run in Triton's interpreter: slow, and wrong in bfloat16.
    interpreted = q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    dtypes = (torch.float16, torch.float32) + (() if interpreted else (torch.bfloat16,))
    if q.device.type != "cuda" and not interpreted:
        return f"device {q.device}: expected a CUDA device"
    if q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability(q.device)}: expected (8, 0) or newer"
    if q.dtype not in dtypes:
        return f"dtype {q.dtype}: expected one of {', '.join(map(str, dtypes))}"
    if q.shape[-1] > 256:
        return f"head_dim={q.shape[-1]}: expected at most 256"
    if spec.block_query not in (64, 128):
        return f"block_query={spec.block_query}: expected 64 or 128"
    if spec.block_key not in (16, 32, 64, 128, 256):
        return f"block_key={spec.block_key}: expected 16, 32, 64, 128 or 256"
    if spec.block_key // spec.importance.key_stride > 128:
        return (
            f"block_key={spec.block_key} with importance.key_stride={spec.importance.key_stride}: expected at most "
            "128 samples a key block"
        )
    if block_count(layout.video_keys, spec.block_key) > 16384:
        return f"{block_count(layout.video_keys, spec.block_key)} key blocks: expected at most 16384"
    if layout.permutation is not None and layout.permutation.device != q.device:
        return f"permutation on {layout.permutation.device}: expected {q.device}"
    return None


@cache
def _reference() -> Implementation:
    def select(q, k, layout, spec, scale, _):
        found = importance.block_importance(q, k, layout, spec, scale)
        return allocation.allocate(found, pyramid.coarsest_levels(k, layout, spec), spec)

    def attend(q, k, v, _, lists, layout, spec, scale):
        return sparse.sparse_attention(q, k, v, lists, layout, spec, scale)

    return Implementation("reference", lambda *_: None, select, attend)


@cache
def _triton() -> Implementation:
    # Imported only where they run: PyTorch's CPU builds come without triton.
    from psa_kernels.allocation import triton as allocation
    from psa_kernels.importance import triton as importance
    from psa_kernels.pyramid import triton as pyramid
    from psa_kernels.sparse import triton as sparse

    def select(q, k, layout, spec, scale, built):
        found = importance.block_importance(q, k, layout, spec, scale, built)
        coarsest = pyramid.coarsest_levels(k, layout, spec) if built is None else built.coarsest
        return allocation.allocate(found, coarsest, spec)

    def attend(q, k, v, built, lists, layout, spec, scale):
        return sparse.sparse_attention(q, built, lists, layout, spec, scale)

    return Implementation("triton", pyramid.build_pyramid, select, attend)
