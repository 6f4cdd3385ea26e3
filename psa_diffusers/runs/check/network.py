"""A transformer's layers and their sizes, read from its configuration, and where a preset makes them sparse."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from psa_diffusers.families import find_family
from psa_diffusers.families.family import ModelFamily
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.step_layers import StepLayers
from psa_kernels import AttentionSpec
from psa_presets import Preset, TokenOrder

# What diffusers' attention modules call these two: one or the other.
_PROJECTIONS = (("q", "query"), ("k", "key"))


class Shape(NamedTuple):
    """Of one attention: heads of queries and of keys, and channels of a head."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Network:
    """One transformer.

    Attributes:
        name: in the pipeline.
        kind: its class in diffusers.
        layers: names of its video self-attentions, the first layer first, and `shapes` of each.
        grid: video tokens along frames, height and width.
        matrices: weights of all its matrices, and `parameters` all its weights.
        dense_layers: why single layers, by name, or all of them ("") are dense against the preset.
    """

    name: str
    kind: str
    family: type[ModelFamily]
    layers: tuple[str, ...]
    shapes: tuple[Shape, ...]
    grid: tuple[int, int, int]
    parameters: int
    matrices: int
    dense_layers: dict[str, str]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def why_dense(self, layer: str) -> str | None:
        """Why a layer is dense whatever the preset says; None if it is not."""
        return self.dense_layers.get("", self.dense_layers.get(layer))

    @property
    def shape(self) -> Shape:
        """That of most layers."""
        return Counter(self.shapes).most_common(1)[0][0]


def read_network(name: str, transformer: torch.nn.Module, grid: tuple[int, int, int], preset: Preset | None) -> Network:
    """Read a transformer's layers and sizes; its weights may be on the meta device.

    Raises:
        UnsupportedModelError: it is of no family.
    """
    family = find_family(transformer)
    modules = family.self_attentions(transformer)
    asked = {layer: family.why_not_imitated(getattr(attn, "processor", None)) for layer, attn in modules.items()}
    reasons = {layer: why for layer, why in asked.items() if why is not None}
    everywhere = family.always_dense(transformer)
    if everywhere is None and preset is not None and math.prod(grid) < preset.fewest_tokens:
        everywhere = f"the sequence of {math.prod(grid):,} tokens is shorter than min_tokens={preset.fewest_tokens}"
    return Network(
        name=name,
        kind=type(transformer).__name__,
        family=family,
        layers=tuple(modules),
        shapes=tuple(attention_shape(attn) for attn in modules.values()),
        grid=grid,
        parameters=sum(weight.numel() for weight in transformer.parameters()),
        matrices=sum(part.weight.numel() for part in transformer.modules() if isinstance(part, torch.nn.Linear)),
        dense_layers=reasons if everywhere is None else {"": everywhere},
    )


def attention_shape(attn: Any) -> Shape:
    """Heads and channels of an attention module of diffusers."""
    query, key = (getattr(attn, f"to_{short}", None) or getattr(attn, f"to_{long}") for short, long in _PROJECTIONS)
    heads = getattr(attn, "heads", None) or attn.num_heads
    head_dim = query.out_features // heads
    return Shape(heads, key.out_features // head_dim, head_dim)


class Kind(NamedTuple):
    """A kind of attention: layers of one kind compute the same at sparse steps."""

    spec: AttentionSpec
    order: TokenOrder


@dataclass(frozen=True)
class Usage:
    """Where a kind of attention is used.

    Attributes:
        layer: one of the layers of this kind; None for layers that are dense at sparse steps, for whatever reason.
        calls: how many calls at sparse steps are of the kind, for one guidance branch.
        layers: which layers are of the kind at any sparse step, counted from 0.
    """

    layer: Layer | None
    calls: int
    layers: tuple[int, ...]


def usages(preset: Preset, network: Network, num_steps: int) -> list[Usage]:
    """All kinds of attention that the layers have at the sparse steps of a run, those of most calls first."""
    steps = StepLayers(preset, network.layers)
    first: dict[Kind | None, Layer] = {}
    calls: Counter[Kind | None] = Counter()
    where: dict[Kind | None, set[int]] = {}
    for step in preset.sparse_steps(num_steps):
        for index, layer in enumerate(steps.at(step, num_steps).values()):
            sparse = layer.spec is not None and network.why_dense(layer.name) is None
            kind = Kind(layer.spec, layer.order) if sparse and layer.spec is not None else None
            first.setdefault(kind, layer)
            calls[kind] += 1
            where.setdefault(kind, set()).add(index)
    return [
        Usage(None if kind is None else first[kind], count, tuple(sorted(where[kind])))
        for kind, count in calls.most_common()
    ]
