"""Which implementation a call of full size gets on this device, and whether its kernels compile and work."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace

import torch

from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.served_calls import ServedCalls
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.token_order import permutation_on
from psa_diffusers.runs.check.network import Network, Shape
from psa_kernels import psa_attention
from psa_kernels.backends import BACKENDS
from psa_kernels.backends.base import Backend
from psa_kernels.backends.choose import choose
from psa_kernels.call import Call, make_call

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
TRIAL_TOKENS, TRIAL_TEXT, TRIAL_HEADS = 4096, 64, 2
# Largest distance from the reference, relative to the length of the whole output; rounding gives a tenth of it.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Offer:
    """The implementation that the calls of a layer get.

    Attributes:
        backend: the backend that `auto` takes.
        passed_over: for each faster backend, its name and why it is not taken.
        dense: why the calls go to stock attention nevertheless, or None.
        hardly: why they may be slower than dense ones though they are sparse, or None.
    """

    call: Call
    backend: Backend
    passed_over: tuple[tuple[str, str], ...]
    dense: str | None
    hardly: str | None


@dataclass(frozen=True)
class Trial:
    """A small call on a GPU.

    Attributes:
        first, second: seconds of the first call, which compiles all that no cache has, and of the next call.
        problem: why it failed, in one line, or None.
    """

    first: float | None = None
    second: float | None = None
    problem: str | None = None


def full_size_tensors(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> QKV:
    """Queries, keys and values `[1, tokens, H, D]` in the memory of one row each: their contents do not matter."""
    row = torch.zeros(shape.head_dim, dtype=dtype, device=device)
    counts = shape.heads, shape.kv_heads, shape.kv_heads
    q, k, v = (row.expand(1, tokens, heads, shape.head_dim) for heads in counts)
    return q, k, v


def offer(network: Network, layer: Layer, dtype: torch.dtype, device: str) -> Offer:
    """Find out what a sparse layer's calls of full size get; text tokens are left out.

    If the version of Triton is not a known one, this runs the self-test of the kernel for Hopper GPUs.
    """
    assert layer.spec is not None, "a dense layer gets no implementation"
    q, k, v = full_size_tensors(network.shape, network.tokens, dtype, device)
    call = make_call(q, k, v, layer.spec, permutation=permutation_on(layer.order, network.grid, q.device))
    with warnings.catch_warnings():  # the reasons are returned instead
        warnings.simplefilter("ignore")
        backend = choose(call)
    remarks: list[str] = []
    dense = ServedCalls(remarks.append).why_not(layer, AttentionCall(q[:, :, 0]), (q, k, v), network.tokens)
    faster = BACKENDS[: BACKENDS.index(backend)]
    passed_over = tuple((each.name, _why_not(each, call)) for each in faster)
    return Offer(call, backend, passed_over, dense, remarks[0] if remarks else None)


def _why_not(backend: Backend, call: Call) -> str:
    """Why `auto` passed over a backend."""
    precision = call.spec.precision
    if call.q.device.type not in backend.devices:
        return f"for {' and '.join(backend.devices)} devices"
    if precision not in backend.precisions and "native" not in backend.precisions:
        return f"for precision {' or '.join(backend.precisions)}; the preset's is {precision}"
    obstacle = backend.why_not(call)
    return "does not pay for calls of this size on this device" if obstacle is None else obstacle


def try_kernels(chosen: Offer, shape: Shape) -> Trial:
    """Make one small call twice on the offer's device, and compare it with the reference given the same lists."""
    like, spec = chosen.call.q, chosen.call.spec
    if spec.precision not in chosen.backend.precisions:
        spec = replace(spec, precision="native")  # the backend computes natively instead
    generator = torch.Generator(like.device).manual_seed(0)
    counts = TRIAL_HEADS * shape.heads // shape.kv_heads, TRIAL_HEADS, TRIAL_HEADS
    sizes = [(1, TRIAL_TOKENS + TRIAL_TEXT, heads, shape.head_dim) for heads in counts]
    q, k, v = (torch.randn(size, dtype=like.dtype, device=like.device, generator=generator) for size in sizes)
    name, marks = chosen.backend.implementation, [time.perf_counter()]
    try:
        for _ in range(2):
            out, lists = psa_attention(q, k, v, spec, text_after=TRIAL_TEXT, implementation=name, return_lists=True)
            if out.is_cuda:
                torch.cuda.synchronize(out.device)
            marks.append(time.perf_counter())
        expected = psa_attention(q, k, v, spec, text_after=TRIAL_TEXT, implementation="reference", lists=lists)
    except Exception as error:  # a compiler can fail in many ways, and all of them are of interest here
        return Trial(problem=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    distance = float((out.float() - expected.float()).norm() / expected.float().norm())
    problem = None if distance <= TOLERANCE else f"its result is {distance:.3f} away from the reference's"
    return Trial(marks[1] - marks[0], marks[2] - marks[1], problem)
