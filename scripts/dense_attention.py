"""The dense attention methods that whole models are timed with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

FA3_MODULE = "fa3_fwd_interface"
# Calls on fewer tokens are left alone: attention among text tokens.
MIN_TOKENS = 2048


def prefer_cudnn() -> AbstractContextManager:
    """cuDNN wherever it serves a call."""
    order = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    return sdpa_kernel(list(order), set_priority=True)


@contextmanager
def flash_attention_3() -> Iterator[None]:
    """FlashAttention 3 for the self-attention of the video, whatever mask that is given: see `all_text_is_real`.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    attention = importlib.import_module(FA3_MODULE).flash_attn_func

    @torch.library.custom_op("psa_bench::fa3", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor")
    def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).contiguous()

    @fa3.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.new_empty(q.shape)

    original = F.scaled_dot_product_attention

    def replacement(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if query.shape == key.shape and query.shape[2] >= MIN_TOKENS:
            return fa3(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        return original(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def all_text_is_real(inputs: dict[str, Any]) -> bool:
    """Whether a model's inputs mask no text, so that attention without a mask computes the same."""
    return all(bool(mask.all()) for name, mask in inputs.items() if name.startswith("encoder_attention_mask"))


DENSE: dict[str, Callable[[], AbstractContextManager]] = {
    "sdpa-default": nullcontext,
    "sdpa-cudnn": prefer_cudnn,
    "fa3": flash_attention_3,
}
