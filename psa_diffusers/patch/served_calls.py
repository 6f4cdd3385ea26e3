"""Decides which sparse calls go to stock attention, because sparse attention is or may be slower on this device."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.sites import Layer
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import Call, make_call

# `min_tokens: auto`: floating point operations of a dense call in bfloat16 or float16 on a GPU. The host takes about as
# long to launch a sparse call however small it is. Measured on an H100 (docs/benchmarks/min-tokens.json, host.json): up
# to 0.26e11 every kind of sparse call was slower than the dense one, at 0.69e11 those that make lists, and from 1.65e11
# on none.
LOSES_BELOW, GAINS_FROM = 2.7e10, 1.5e11
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FLOAT32 = (
    "sparse attention in float32 can be slower than dense on a GPU (0.7 to 2.9 times as fast on an H100); load the "
    "model in bfloat16 or float16, or set float32_on_gpu: sparse in the preset"
)
LITTLE = (
    "attention of {shape} is {work:.3g} GFLOP, and on a GPU sparse attention is slower below {least:.0f} (min_tokens: "
    "auto); with min_tokens: 0 in the preset, or another integer, only the number of tokens counts"
)
HARDLY = (
    "attention of {shape} is {work:.3g} GFLOP: on a GPU sparse attention gains from about {least:.0f} on, and may be "
    "slower than dense here; min_tokens in the preset is the number of tokens from which on it is sparse"
)


class ServedCalls:
    """Decides once for each kind of call. A kind that was refused is not even projected the next time.

    Args:
        remark: told of kinds that are sparse and may be slower than dense.
    """

    def __init__(self, remark: Callable[[str], None] = lambda what: None) -> None:
        self._remark = remark
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
            self._answers[key], hardly = _obstacle(layer, qkv, video, by_kernel)
            if hardly is not None:
                self._remark(hardly)
        if (why := self._answers[key]) is not None:
            self._refused[_like(layer, call)] = why
        return why


def _like(layer: Layer, call: AttentionCall) -> Hashable:
    hidden = call.hidden_states
    return layer.name, layer.spec, hidden.shape, hidden.dtype, hidden.device


def is_gpu(device: torch.device) -> bool:
    """Whether a device is anything but a CPU, where the reference would lose to dense attention."""
    return device.type != "cpu"


def _obstacle(layer: Layer, qkv: QKV, video: int, by_kernel: bool) -> tuple[str | None, str | None]:
    """Why a call should be dense, and why it may be slower though it is sparse; None each where there is no reason."""
    q, k, v = qkv
    if not is_gpu(q.device):
        return None, None
    assert layer.spec is not None, "a layer without a spec is never routed here"
    call = make_call(q, k, v, layer.spec, text_after=q.shape[1] - video)
    if by_kernel and (why := why_no_kernel(call)) is not None:
        return f"no kernel serves such calls: {why}", None
    if by_kernel and q.dtype == torch.float32 and layer.preset.float32_on_gpu == "dense":
        return FLOAT32, None
    # In float32 dense attention takes longer.
    if layer.preset.min_tokens != "auto" or q.dtype == torch.float32 or call.dense_work >= GAINS_FROM:
        return None, None
    if call.dense_work < LOSES_BELOW:
        return _say(LITTLE, call, LOSES_BELOW), None
    return None, _say(HARDLY, call, GAINS_FROM)


def _say(what: str, call: Call, least: float) -> str:
    batch, tokens, heads, head_dim = call.q.shape
    shape = f"{tokens:,} tokens x {heads} heads x {head_dim}" + (f" x {batch} videos" if batch > 1 else "")
    return what.format(shape=shape, work=call.dense_work / 1e9, least=least / 1e9)
