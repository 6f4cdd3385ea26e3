"""Decides which sparse calls go to stock attention, because sparse attention is or may be slower on this device."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.sites import Layer
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import Call, make_call

# `min_tokens: auto`: floating point operations of a dense call in bfloat16 or float16, from which on a sparse one gains
# on a GPU. With less the host takes longer to launch it than the GPU takes for the dense one. Measured on an H100
# (docs/benchmarks/min-tokens.json, host.json): at 1.65e11 every kind was faster, at 0.69e11 only with kept lists.
MIN_GPU_WORK = 1.5e11
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FLOAT32 = (
    "sparse attention in float32 can be slower than dense on a GPU (0.7 to 2.9 times as fast on an H100); load the "
    "model in bfloat16 or float16, or set float32_on_gpu: sparse in the preset"
)
LITTLE = (
    "attention of {shape} is {work:.3g} GFLOP, and on a GPU sparse attention gains from about {least:.0f} on "
    "(min_tokens: auto); with min_tokens: 0 in the preset, or another integer, only the number of tokens counts"
)


class ServedCalls:
    """Decides once for each kind of call. A kind that was refused is not even projected the next time."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, str | None] = {}
        self._refused: dict[Hashable, str] = {}

    def earlier(self, layer: Layer, call: AttentionCall) -> str | None:
        """Why a call like this was refused earlier; None if it was not."""
        return self._refused.get(_like(layer, call)) if self._refused else None

    def why_not(self, layer: Layer, call: AttentionCall, qkv: QKV, video: int, by_kernel: bool = True) -> str | None:
        """Why a sparse call should be dense, in one line; None if a kernel serves it, and on a CPU.

        Args:
            video: number of video tokens.
            by_kernel: whether a kernel should compute it. If not, only its size counts.
        """
        q, preset = qkv[0], layer.preset
        key = (layer.spec, preset.float32_on_gpu, preset.min_tokens, q.shape, q.dtype, q.device, video, by_kernel)
        if key not in self._answers:
            self._answers[key] = _obstacle(layer, qkv, video, by_kernel)
        if (why := self._answers[key]) is not None:
            self._refused[_like(layer, call)] = why
        return why


def _like(layer: Layer, call: AttentionCall) -> Hashable:
    hidden = call.hidden_states
    return layer.name, layer.spec, hidden.shape, hidden.dtype, hidden.device


def is_gpu(device: torch.device) -> bool:
    """Whether a device is anything but a CPU, where the reference would lose to dense attention."""
    return device.type != "cpu"


def _obstacle(layer: Layer, qkv: QKV, video: int, by_kernel: bool) -> str | None:
    q, k, v = qkv
    if not is_gpu(q.device):
        return None
    assert layer.spec is not None, "a layer without a spec is never routed here"
    call = make_call(q, k, v, layer.spec, text_after=q.shape[1] - video)
    if by_kernel and (why := why_no_kernel(call)) is not None:
        return f"no kernel serves such calls: {why}"
    if by_kernel and q.dtype == torch.float32 and layer.preset.float32_on_gpu == "dense":
        return FLOAT32
    return _too_little(call) if layer.preset.min_tokens == "auto" else None


def _too_little(call: Call) -> str | None:
    """Why a call is too small to gain on a GPU; None if it is not, or in float32, where dense attention is slower."""
    if call.q.dtype == torch.float32 or call.dense_work >= MIN_GPU_WORK:
        return None
    batch, tokens, heads, head_dim = call.q.shape
    shape = f"{tokens:,} tokens x {heads} heads x {head_dim}" + (f" x {batch} videos" if batch > 1 else "")
    return LITTLE.format(shape=shape, work=call.dense_work / 1e9, least=MIN_GPU_WORK / 1e9)
