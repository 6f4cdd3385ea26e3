"""Presets for short sequences, and what counts as equal."""

from __future__ import annotations

from typing import Any

import torch

from psa_diffusers.presets import Preset, load_preset


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
