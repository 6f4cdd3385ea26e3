"""Presets for short sequences, and what counts as equal."""

from __future__ import annotations

from typing import Any

import torch

from psa_presets import Preset, load_preset


def preset(**changes: Any) -> Preset:
    """psa-3 with blocks so small that 192 tokens leave something to choose."""
    small = {"min_tokens": 0, "block": {"query": 32, "key": 16}}
    return load_preset("psa-3").replace(**{**small, **changes})


EVERYTHING = preset(dense_steps=0.0, thresholds=[1.0, 1.0, 1.0])
SPARSE = preset(dense_steps=0.0)


def assert_equal_to_rounding(actual: torch.Tensor, stock: torch.Tensor, message: Any = "") -> None:
    """Equal but for what float32 rounds; Allegro's scheduler divides by a small number, where rounding errors grow."""
    assert actual.shape == stock.shape
    assert float((actual - stock).abs().max()) <= 5e-5 * max(1.0, float(stock.abs().max())), message


def pooled(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Means of `factor` neighbours inside blocks of 16; `[N, H, D]` to `[N / factor, H, D]`, for whole blocks."""
    return x.unflatten(0, (-1, factor)).mean(1)


def pooled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: torch.Tensor, video: torch.Tensor, factor: int
) -> torch.Tensor:
    """One sample, token by token in float64: video queries read video pooled and text exactly, text queries all so.

    Args:
        q, k, v: `[N, H, D]`.
        text, video: positions of the real text tokens and of the video tokens.
        factor: how many video tokens are pooled to one.
    """
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    count = torch.cat([torch.zeros(len(text)), torch.full((len(video) // factor,), float(factor)).log()]).double()
    out = torch.zeros_like(q)
    keys = torch.cat([k[text], pooled(k[video], factor)])
    values = torch.cat([v[text], pooled(v[video], factor)])
    weights = (torch.einsum("qhd,khd->hqk", q[video], keys) * scale + count).softmax(-1)
    out[video] = torch.einsum("hqk,khd->qhd", weights, values)
    every = torch.cat([text, video])
    weights = (torch.einsum("qhd,khd->hqk", q[text], k[every]) * scale).softmax(-1)
    out[text] = torch.einsum("hqk,khd->qhd", weights, v[every])
    return out
