"""Decides which sparse calls go to stock attention, because sparse attention is or may be slower on this device."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.sites import Layer
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import make_call

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FLOAT32 = (
    "sparse attention in float32 was not measured on a GPU and may be slower than dense; load the model in bfloat16 or "
    "float16, or set float32_on_gpu: sparse in the preset"
)


class ServedCalls:
    """Decides once for each kind of call. A kind that was refused is not even projected the next time."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, str | None] = {}
        self._refused: dict[Hashable, str] = {}

    def earlier(self, layer: Layer, call: AttentionCall) -> str | None:
        """Why a call like this was refused earlier; None if it was not."""
        return self._refused.get(_like(layer, call)) if self._refused else None

    def why_not(self, layer: Layer, call: AttentionCall, qkv: QKV, video: int) -> str | None:
        """Why a sparse call should be dense, in one line; None if a kernel serves it, and on a CPU.

        Args:
            video: number of video tokens.
        """
        q = qkv[0]
        key = (layer.spec, layer.preset.float32_on_gpu, q.shape, q.dtype, q.device, video)
        if key not in self._answers:
            self._answers[key] = _obstacle(layer, qkv, video)
        if (why := self._answers[key]) is not None:
            self._refused[_like(layer, call)] = why
        return why


def _like(layer: Layer, call: AttentionCall) -> Hashable:
    hidden = call.hidden_states
    return layer.name, layer.spec, hidden.shape, hidden.dtype, hidden.device


def is_gpu(device: torch.device) -> bool:
    """Whether a device is anything but a CPU, where the reference would lose to dense attention."""
    return device.type != "cpu"


def _obstacle(layer: Layer, qkv: QKV, video: int) -> str | None:
    q, k, v = qkv
    if not is_gpu(q.device):
        return None
    assert layer.spec is not None, "a layer without a spec is never routed here"
    why = why_no_kernel(make_call(q, k, v, layer.spec, text_after=q.shape[1] - video))
    if why is not None:
        return f"no kernel serves such calls: {why}"
    return FLOAT32 if q.dtype == torch.float32 and layer.preset.float32_on_gpu == "dense" else None
