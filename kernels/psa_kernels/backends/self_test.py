"""Tests whether a backend works with an untried version of Triton: small calls must agree with the portable kernels.

Versions that are known to work are not tested. Each answer is kept, in memory and on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from psa_kernels import verdicts
from psa_kernels.backends.base import Backend
from psa_kernels.backends.triton import Triton, triton_version
from psa_kernels.blocks import block_count
from psa_kernels.call import Call, make_call
from psa_kernels.devices import cache_bytes
from psa_kernels.lists import BlockLists
from psa_kernels.spec import AttentionSpec
from psa_kernels.verdicts import UntestedError

# Largest distance of one query's output from the portable kernel's, relative to its length. Rounding gives at most a
# sixth of it. One missing row of keys, of the several hundred that a query attends here, gives some queries far more.
TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.01}
# The same for integer products, which are compared with the native portable kernel: they give 0.02 to 0.04.
INT8_TOLERANCE = 0.1
# Video tokens and heads of a call, enough to give each multiprocessor of a large GPU several items.
TOKENS, HEADS = 4000, 12
TEXT = 77
LISTED_BLOCKS = 12

_lock = threading.Lock()
_answers: dict[_Variant, str | None] = {}


class _Variant(NamedTuple):
    """What the compiler is given: calls that agree in these run the same code."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_query: int
    block_key: int
    levels: tuple[int, ...]
    precision: str
    waits: bool  # programs may wait for each other in large calls
    text_before: bool
    text_after: bool
    permuted: bool
    causal: bool


def obstacle(backend: Backend, call: Call) -> str | None:
    """Why a backend cannot serve a call with the installed Triton, in one line, or None. Only the first call is slow.

    While a CUDA graph is captured or a function compiled, no test may run. Then only known answers count.
    """
    spec, layout = call.spec, call.layout
    precision = spec.precision if spec.precision in backend.precisions else "native"
    waits = spec.rule == "count" and len(spec.levels) > 1
    variant = _Variant(
        backend.name, call.q.device, call.q.dtype, call.q.shape[-1], spec.block_query, spec.block_key, spec.levels,
        precision, waits, layout.text_before > 0, layout.text_after > 0, layout.permutation is not None,
        call.causal is not None,
    )  # fmt: skip
    if variant not in _answers:
        busy = _busy()
        if busy is not None:
            return f"triton {triton_version()}: {busy}"
        with _lock:
            if variant not in _answers:
                problem = verdicts.obstacle(_key(variant), lambda: _problem(backend, variant))
                _answers[variant] = None if problem is None else f"triton {triton_version()}: {problem}"
    return _answers[variant]


def _busy() -> str | None:
    """Why nothing can be tested now."""
    if torch.compiler.is_compiling():
        return "it is not tested while a function is compiled; call it once outside"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "it is not tested while a CUDA graph is captured; call it once before"
    return None


def _key(variant: _Variant) -> dict[str, str]:
    """All that an answer depends on."""
    device = variant.device
    gpu, capability = "none", "none"
    if device.type == "cuda":
        gpu, capability = torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))
    return {
        "triton": triton_version(),
        "torch": torch.__version__,
        "psa-diffusers": _package_version(),
        "sources": _sources(),
        "gpu": gpu,
        "capability": capability,
        **{name: str(value) for name, value in variant._asdict().items() if name != "device"},
    }


def _package_version() -> str:
    try:
        return version("psa-diffusers")
    except PackageNotFoundError:
        return "not installed"


@cache
def _sources() -> str:
    """A digest of all sources of the operator, because a kernel is made of many of them."""
    digest, folder = sha256(), Path(verdicts.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()


def _problem(backend: Backend, variant: _Variant) -> str | None:
    """What is wrong with the results of a backend, in one line, or None.

    Raises:
        UntestedError: the portable kernels have no result to compare with, or there is no memory.
    """
    try:
        with torch.no_grad(), _on(variant.device):
            for heads, tokens, runs_over in _sizes(variant):
                problem = _difference(backend, variant, heads, tokens, runs_over)
                if problem is not None:
                    return problem
            return None
    except torch.OutOfMemoryError:
        raise UntestedError("no memory is left for its self-test") from None


def _sizes(variant: _Variant) -> list[tuple[int, int, bool]]:
    """Heads and video tokens of the calls, and whether their sums run over."""
    sizes = [(HEADS, TOKENS, False)]
    if variant.precision == "native":
        sizes.append((HEADS, TOKENS, True))
    if variant.waits:
        # One head of more rows than half the cache holds of keys and values, so that programs keep in step.
        rows = cache_bytes(variant.device) // (4 * variant.head_dim * variant.dtype.itemsize)
        if variant.causal:
            rows *= 2  # than the whole cache
        share = sum(1 / factor for factor in variant.levels)
        sizes.append((1, max(TOKENS, int(rows / share) + variant.block_key), False))
    return sizes


def _difference(backend: Backend, variant: _Variant, heads: int, tokens: int, runs_over: bool) -> str | None:
    """How the results of one call differ from the portable kernel's, in one line; None if by rounding alone."""
    call, lists = _small_call(variant, heads, tokens, runs_over)
    try:
        expected = _attend(Triton(), call, lists, False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        raise UntestedError(f"its self-test has nothing to compare with: {type(error).__name__}: {message}") from error
    tolerance = TOLERANCES[variant.dtype] if variant.precision == "native" else INT8_TOLERANCE
    # The plain call as those of all heads go, the others as groups of heads do: their pyramid is made before.
    alone = tokens == TOKENS and not runs_over
    # The first launch goes through Triton, the second is the prepared one.
    for _ in range(2):
        distance = (_attend(backend, call, lists, alone) - expected).norm(dim=-1) / expected.norm(dim=-1)
        largest = distance.max().item()  # NaN, if any is
        if not largest <= tolerance:
            return (
                f"an output differs from the portable kernel's by {largest:.2g} of its length, expected at most "
                f"{tolerance} ({tokens} tokens, head_dim {variant.head_dim}, {str(variant.dtype)[6:]})"
            )
    return None


def _attend(backend: Backend, call: Call, lists: BlockLists, alone: bool) -> torch.Tensor:
    """The outputs of the video queries: float32 `[1, N, H, D]`, NaN where none was written."""
    out = torch.full_like(call.q, torch.nan)
    keys = backend.pool_keys(call, False, alone) if backend.has_pyramid else None
    backend.attend(call, keys, lists, out)
    first, count = call.layout.text_before, call.layout.video_queries
    return out[:, first : first + count].float()


def _small_call(variant: _Variant, heads: int, tokens: int, runs_over: bool) -> tuple[Call, BlockLists]:
    """A call of random tensors, always the same, and lists of a few blocks of every level for each query block.

    Args:
        runs_over: let keys in the second half exceed those in the first by more than an exponent can hold. In a causal
            call the first half exceeds the second, because queries meet their own key first.
    """
    device, levels = variant.device, len(variant.levels)
    chance = torch.Generator(device).manual_seed(0)
    before, after = TEXT * variant.text_before, TEXT * variant.text_after
    q, k, v = (
        torch.randn(
            1, before + tokens + after, heads, variant.head_dim, generator=chance, device=device, dtype=torch.float32
        )
        for _ in range(3)
    )
    if runs_over:
        q = 0.1 * q + 4 / variant.head_dim**0.5
        middle = before + tokens // 2
        (k[:, :middle] if variant.causal else k[:, middle:]).add_(50)
    spec = AttentionSpec(
        block_query=variant.block_query,
        block_key=variant.block_key,
        levels=variant.levels,
        thresholds=tuple((index + 1) / levels for index in range(levels)),
        precision=variant.precision,
    )
    permutation = torch.randperm(tokens, generator=chance, device=device) if variant.permuted else None
    q, k, v = (x.to(variant.dtype) for x in (q, k, v))
    call = make_call(q, k, v, spec, before, after, permutation, causal=variant.causal)
    blocks = block_count(tokens, variant.block_query), block_count(tokens, variant.block_key)
    # Ranks of random numbers: each row lists as many blocks, here and there in the sequence.
    places = torch.rand(1, heads, *blocks, generator=chance, device=device, dtype=torch.float32)
    ranks = places.argsort(-1).argsort(-1)
    listed = ranks < LISTED_BLOCKS
    if variant.causal:
        rows, keys = (torch.arange(count, device=device) for count in blocks)
        listed &= (keys + 1) * variant.block_key <= (rows * variant.block_query)[:, None]
    return call, BlockLists.from_levels(torch.where(listed, ranks % levels, levels), levels)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one meanwhile, and allow waiting for it; does nothing for a CPU."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    with torch.cuda.device(device):
        try:
            torch.cuda.set_sync_debug_mode(0)
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
