"""Relative error of attention outputs on the queries, keys and values of a model that attends densely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from psa_kernels import AttentionSpec, psa_attention
from psa_transformers.stock import Stock

APART = 3  # the error is that of every third layer, from the second on
NAME = "psa_language_errors"


def relative_error(model: Any, ids: torch.Tensor, spec: AttentionSpec) -> tuple[float, float]:
    """How far sparse attention is from dense attention, in layers that are given dense inputs.

    The error of a head is the L2 norm of what differs over that of dense attention; of a layer, the root mean square
    over heads. In half precision, rounding of both is a part of it, some thousandths.

    Args:
        ids: `[N]`, on the model's device.
        spec: what each layer computes instead.

    Returns:
        The mean error of layers, and their mean density.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(layer: int, tensors: tuple[torch.Tensor, ...], scale: float | None, dense: torch.Tensor) -> None:
        if layer % APART == 1:
            q, k, v = (x.transpose(1, 2) for x in tensors)
            out, stats = psa_attention(q, k, v, spec, scale=scale, causal=True, return_stats=True)
            found.append((_error(out, dense), stats.density.mean()))

    with _watched(model, see):
        model.base_model(input_ids=ids[None], use_cache=False)
    errors, densities = (torch.stack(each) for each in zip(*found, strict=True))
    return float(errors.mean()), float(densities.mean())


def _error(out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Both are `[1, N, H, D]`."""
    missing, all_there = (x.float().square().sum((0, 1, 3)) for x in (out.float() - dense.float(), dense))
    return (missing / all_there).mean().sqrt()


@contextmanager
def _watched(model: Any, see: Callable[..., None]) -> Iterator[None]:
    """Each layer's attention is as before, and is looked at: its number, queries, keys and values, scale and output."""
    stock = Stock(model.config._attn_implementation)

    def attend(module: torch.nn.Module, *tensors: Any, **arguments: Any) -> tuple[torch.Tensor, Any]:
        out, weights = stock.attend(module, *tensors, **arguments)
        see(module.layer_idx, tensors[:3], arguments.get("scaling"), out)
        return out, weights

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, stock.mask)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(stock.name)
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)
