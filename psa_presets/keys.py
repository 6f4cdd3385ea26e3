"""The keys of a preset in code, for type checkers and editors; `fields.py` checks the values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from psa_presets.fields import BlockSizes, ImportanceSettings, LayerRule, StepRule


class BlockKeys(TypedDict, total=False):
    """Tokens per query block and per key block."""

    query: int
    key: int


class ImportanceKeys(TypedDict, total=False):
    """How the importance of a key block for a query block is estimated."""

    estimator: Literal["sampled", "pooled"]
    statistic: Literal["max", "mean"]
    query_stride: int
    key_stride: int


class LayerKeys(TypedDict, total=False):
    """What one layer's attention does."""

    block: BlockKeys | BlockSizes
    levels: Sequence[int]
    rule: Literal["count", "mass", "budget"]
    thresholds: Sequence[float]
    density: float | None
    floor: float
    importance: ImportanceKeys | ImportanceSettings
    similarity: Sequence[float] | None
    rest: Literal["skip", "mean"]
    precision: Literal["native", "int8_qk"]
    error_model: Literal["tuned", "fitted", "auto"]
    order: Literal["hilbert", "tiles", "raster"]
    tile: Sequence[int]


class RuleKeys(LayerKeys, total=False):
    """Changes for the layers, or the steps, that `match` names."""

    match: str | int
    dense: bool


class PresetKeys(LayerKeys, total=False):
    """All keys of a preset."""

    name: str
    source: str
    dense_steps: float
    dense_last: float
    refresh: int
    share_guidance: bool
    correction: bool
    min_tokens: int | Literal["auto"]
    dense_attention: Literal["stock", "psa"]
    float32_on_gpu: Literal["dense", "sparse"]
    layers: Sequence[RuleKeys | LayerRule]
    steps: Sequence[RuleKeys | StepRule]
