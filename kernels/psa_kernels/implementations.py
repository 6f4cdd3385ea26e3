"""Which implementations of the operator there are, and which one a call gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec

import torch

from psa_kernels.allocation import reference as allocation
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.allocation.prices import upgrade_prices
from psa_kernels.blocks import block_count
from psa_kernels.importance import reference as importance
from psa_kernels.layout import TokenLayout
from psa_kernels.limits import LEAST_HOPPER_ROWS, MOST_BLOCK_SAMPLES, MOST_HOPPER_LEVELS, MOST_KEY_BLOCKS
from psa_kernels.lists import BlockLists
from psa_kernels.pyramid import reference as pyramid
from psa_kernels.sparse import reference as sparse
from psa_kernels.spec import AttentionSpec

IMPLEMENTATIONS = ("auto", "reference", "triton", "hopper")
# What `auto` may take beside these, for the precision `int8_qk`.
INT8 = "hopper-int8"
# Gluon changes from one release of Triton to the next.
GLUON_VERSIONS = ("3.6.",)
# Floating point operations of dense attention below which the kernel for Hopper, whose launch takes the host half a
# millisecond longer, spares the GPU less than that.
LEAST_HOPPER_WORK = 1e12


class SlowerKernelWarning(UserWarning):
    """A call gets a slower implementation than its device has."""


@dataclass(frozen=True)
class Implementation:
    """The two halves of the operator, and the pyramid that both may use.

    Attributes:
        name: one of `IMPLEMENTATIONS` but `auto`, or `INT8`.
        pyramid_rows: `(layout, spec)` to the rows that the pyramid of one head has, its keys and its values each; 0
            from an implementation that pools head by head inside `attend`.
        pool_keys: `(k, layout, spec, selects)` to the pyramid of keys; `selects` says whether `select` will be given
            it.
        select: `(q, k, v, layout, spec, scale, pyramid of keys or None)` to the lists.
        attend: `(q, k, v, pyramid of keys, lists, layout, spec, scale, out)`: pools the values and fills `out`, but for
            the rows of text queries.
    """

    name: str
    pyramid_rows: Callable[..., int]
    pool_keys: Callable[..., object]
    select: Callable[..., BlockLists]
    attend: Callable[..., object]


def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    wanted: str,
    strict: bool = False,
) -> Implementation:
    """The implementation of one call.

    On a CPU `auto` takes the reference. On a GPU it takes the kernel for Hopper there, unless the call is small, else
    the portable kernels, else the reference, and warns once for each reason not to take the best for the device. The
    precision `int8_qk` is that of the reference and of the kernel for Hopper; the others compute natively.

    Args:
        wanted: one of `IMPLEMENTATIONS`; `hopper` serves both precisions.
        strict: raise instead of that warning.

    Raises:
        ValueError: the wanted implementation cannot serve the call.
        RuntimeError: strict, and `auto` would take a slower implementation than the device has, or one without the
            precision that the spec asks for.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={wanted!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if wanted == "reference" or (wanted == "auto" and not q.is_cuda):
        return _reference()
    made = {"triton": _triton, "hopper": _hopper, INT8: _hopper_int8}
    int8 = spec.precision == "int8_qk"
    if wanted != "auto":
        name = INT8 if int8 and wanted == "hopper" else wanted
        obstacle = _why_not(name, q, k, v, layout, spec, scale)
        if obstacle is None and int8 and name != INT8:
            obstacle = f"precision={spec.precision!r}: expected 'native'"
        if obstacle is not None:
            raise ValueError(f"implementation={wanted!r}: {obstacle}")
        return made[name]()
    names = ["triton"]
    work = 4 * q.shape[1] * k.shape[1:].numel() * q.shape[0]
    is_hopper = _is_hopper(q.device)
    if is_hopper and work >= LEAST_HOPPER_WORK:
        names.insert(0, "hopper")
    # A small call is faster without it where it could be had.
    if int8 and ("hopper" in names or not is_hopper):
        names.insert(0, INT8)
    for name in names:
        obstacle = _why_not(name, q, k, v, layout, spec, scale)
        if obstacle is None:
            return made[name]()
        problem = f"the {name} kernel cannot be used"
        if name == INT8:
            problem = f"precision={spec.precision!r} cannot be used"
        if strict:
            raise RuntimeError(f"strict: {problem}: {obstacle}")
        _warn_once(f"{problem}, attention is slower: {obstacle}")
    return _reference()


def _why_not(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
) -> str | None:
    """The reason why an implementation cannot serve a call; each needs what those before it need."""
    obstacle = why_not_triton(q, k, layout, spec)
    if obstacle is None and name != "triton":
        obstacle = why_not_hopper(q, k, v, spec, scale)
    if obstacle is None and name == INT8:
        obstacle = _why_not_int8(q)
    return obstacle


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, SlowerKernelWarning, stacklevel=4)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


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
    if spec.block_key // spec.importance.key_stride > MOST_BLOCK_SAMPLES:
        return (
            f"block_key={spec.block_key} with importance.key_stride={spec.importance.key_stride}: expected at most "
            f"{MOST_BLOCK_SAMPLES} samples a key block"
        )
    if block_count(layout.video_keys, spec.block_key) > MOST_KEY_BLOCKS:
        return f"{block_count(layout.video_keys, spec.block_key)} key blocks: expected at most {MOST_KEY_BLOCKS}"
    if layout.permutation is not None and layout.permutation.device != q.device:
        return f"permutation on {layout.permutation.device}: expected {q.device}"
    return None


def why_not_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, scale: float) -> str | None:
    """The reason why the attention kernel for Hopper cannot serve a call that the Triton kernels can, or None."""
    if not _is_hopper(q.device):
        return f"device {q.device}: expected a GPU of compute capability (9, 0)"
    if not version("triton").startswith(GLUON_VERSIONS):
        return f"triton {version('triton')}: expected {' or '.join(f'{start}*' for start in GLUON_VERSIONS)}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}: expected torch.bfloat16 or torch.float16"
    if q.shape[-1] not in (64, 128):
        return f"head_dim={q.shape[-1]}: expected 64 or 128"
    if spec.block_query % 128:
        return f"block_query={spec.block_query}: expected 128"
    if spec.block_key not in (32, 64, 128):
        return f"block_key={spec.block_key}: expected 32, 64 or 128"
    if spec.block_key // spec.levels[-1] < LEAST_HOPPER_ROWS or len(spec.levels) > MOST_HOPPER_LEVELS:
        return (
            f"levels={list(spec.levels)}: expected at most {MOST_HOPPER_LEVELS}, and at least {LEAST_HOPPER_ROWS} rows "
            f"of each of the {spec.block_key} keys"
        )
    if spec.rest != "skip":
        return f"rest={spec.rest!r}: expected 'skip'"
    if not scale > 0:
        return f"scale={scale}: expected more than 0"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:3]):
            return f"{name}: expected rows at multiples of 16 bytes, got strides {x.stride()}"
    return None


def _why_not_int8(q: torch.Tensor) -> str | None:
    """The reason why the kernel for Hopper cannot multiply queries by keys in integers in a call that it can serve."""
    # What runs over is computed anew only under a frozen maximum, which float16 has not the range for.
    return None if q.dtype == torch.bfloat16 else f"dtype {q.dtype}: expected torch.bfloat16"


@cache
def _reference() -> Implementation:
    def select(q, k, v, layout, spec, scale, _):
        found = importance.block_importance(q, k, layout, spec, scale)
        if spec.rule == "budget":
            return allocate_budget(upgrade_prices(q, k, v, found, layout, spec, scale), found, spec)
        return allocation.allocate(found, pyramid.coarsest_levels(k, layout, spec), spec)

    def attend(q, k, v, _, lists, layout, spec, scale, out):
        sparse.sparse_attention(q, k, v, lists, layout, spec, scale, out)

    return Implementation("reference", lambda *_: 0, lambda *_: None, select, attend)


@cache
def _triton() -> Implementation:
    # Imported only where they run: PyTorch's CPU builds come without triton.
    from psa_kernels.allocation import triton as allocation
    from psa_kernels.allocation.triton_budget import allocate_budget
    from psa_kernels.allocation.triton_prices import upgrade_prices
    from psa_kernels.importance import triton as importance
    from psa_kernels.pyramid import triton as pyramid
    from psa_kernels.sparse import triton as sparse

    def select(q, k, v, layout, spec, scale, keys):
        found = importance.block_importance(q, k, layout, spec, scale)
        if spec.rule == "budget":
            return allocate_budget(upgrade_prices(q, k, v, found, layout, spec, scale), found, spec)
        coarsest = pyramid.coarsest_levels(k, layout, spec) if keys is None else keys.coarsest
        return allocation.allocate(found, coarsest, spec)

    def attend(q, k, v, keys, lists, layout, spec, scale, out):
        sparse.sparse_attention(q, pyramid.add_values(keys, v, layout), lists, layout, spec, scale, out=out)

    return Implementation("triton", pyramid.pyramid_rows, pyramid.pool_keys, select, attend)


@cache
def _hopper() -> Implementation:
    from psa_kernels.pyramid import triton as pyramid
    from psa_kernels.sparse import hopper

    def attend(q, k, v, keys, lists, layout, spec, scale, out):
        hopper.sparse_attention(q, pyramid.add_values(keys, v, layout), lists, layout, spec, scale, out=out)

    return Implementation(
        "hopper",
        partial(pyramid.pyramid_rows, gathered=True),
        partial(pyramid.pool_keys, gathered=True),
        _triton().select,
        attend,
    )


@cache
def _hopper_int8() -> Implementation:
    from psa_kernels.pyramid import triton as pyramid
    from psa_kernels.sparse import hopper

    def pyramid_rows(layout, spec):
        # Counted as rows of keys and of values in 16 bits, 4 bytes an entry.
        return _hopper().pyramid_rows(layout, spec) + block_count(hopper.quantised_rows(layout, spec), 4)

    def attend(q, k, v, keys, lists, layout, spec, scale, out):
        integers = hopper.quantise_rows(q, keys, layout, spec, scale)
        whole = pyramid.add_values(keys, v, layout)
        hopper.sparse_attention(q, whole, lists, layout, spec, scale, out=out, integers=integers)

    return Implementation(INT8, pyramid_rows, _hopper().pool_keys, _hopper().select, attend)
