"""Applies a preset's rules to its settings for each layer, and checks keys that depend on each other.

Rules for layers apply first, in order, then rules for steps, in order. Later rules win, key by key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from psa_kernels import AttentionSpec, Importance
from psa_presets.errors import PresetError, dotted, refusal
from psa_presets.fields import LayerRule, LayerSettings, Rule, StepRule, layer_ranges
from psa_presets.steps import possible_sets

MAX_CASES = 20_000  # checking more combinations of rules takes minutes


class TokenOrder(NamedTuple):
    """In which order a layer's tokens are cut into blocks: `order` and `tile` of a preset."""

    order: str
    tile: tuple[int, ...]


Key = tuple[str, ...]


class Conflict(NamedTuple):
    """Keys that do not fit together: first the one to name, then the others that may be at fault."""

    reason: str
    keys: tuple[Key, ...]


def conflict(settings: LayerSettings) -> Conflict | None:
    """The first disagreement between valid values, or None."""
    levels, thresholds, similarity = settings.levels, settings.thresholds, settings.similarity
    block, density = settings.block, settings.density
    for level in levels:
        if block.key % level:
            return Conflict(f"level {level} does not divide block.key = {block.key}", (("levels",), ("block", "key")))
    if settings.rule == "budget":
        if density is None:
            return Conflict("the rule budget needs a density", (("rule",), ("density",)))
        if settings.rest == "mean" and density * block.key < 1:
            reason = f"the mean tokens alone are 1 / {block.key} of dense attention"
            return Conflict(reason, (("density",), ("rest",), ("block", "key")))
        if settings.floor or similarity is not None:
            key = "floor" if settings.floor else "similarity"
            return Conflict(f"the rule budget takes no {key}", ((key,), ("rule",)))
    elif density is not None:
        return Conflict(f"the rule {settings.rule} takes no density", (("density",), ("rule",)))
    elif len(thresholds) != len(levels):
        reason = f"thresholds has length {len(thresholds)}, levels {list(levels)} needs {len(levels)}"
        return Conflict(reason, (("thresholds",), ("levels",)))
    elif similarity is not None and len(similarity) != len(levels) - 1:
        reason = f"similarity has length {len(similarity)}, levels {list(levels)} needs {len(levels) - 1}"
        return Conflict(reason, (("similarity",), ("levels",)))
    for side in ("query", "key"):
        stride, size = getattr(settings.importance, f"{side}_stride"), getattr(block, side)
        if size % stride:
            reason = f"a stride of {stride} does not divide block.{side} = {size}"
            return Conflict(reason, (("importance", f"{side}_stride"), ("block", side)))
    return None


class Placed(NamedTuple):
    """A rule, and where it stands in the preset."""

    place: tuple[str, int]
    rule: Rule


def check_together(
    settings: LayerSettings, layers: Sequence[LayerRule], steps: Sequence[StepRule], num_layers: int | None = None
) -> None:
    """Check the settings, and what rules make of them in each layer at each step of runs of any length.

    Without a number of layers, only layers that rules name are checked.

    Raises:
        PresetError: valid keys do not fit together; it names the last of them that was set.
    """
    numbers = _borders(layers) if num_layers is None else range(num_layers)
    by_layer = dict.fromkeys([(), *(_applying(layers, layer) for layer in numbers)])
    by_step = dict.fromkeys([(), *possible_sets([rule.match for rule in steps])])
    if len(by_layer) * len(by_step) > MAX_CASES:
        reason = f"layers and steps meet in {len(by_layer) * len(by_step)} ways; allowed: up to {MAX_CASES}"
        raise PresetError(reason)
    for of_layer in by_layer:
        for of_step in by_step:
            applying = [
                *(Placed(("layers", index), layers[index]) for index in of_layer),
                *(Placed(("steps", index), steps[index]) for index in of_step),
            ]
            found = conflict(_merged(settings, [rule for _, rule in applying]))
            if found:
                raise _told(found, settings, applying)


def check_layers(
    settings: LayerSettings, layers: Sequence[LayerRule], steps: Sequence[StepRule], num_layers: int
) -> None:
    """Check that every layer that a rule names exists, and what rules make of the settings in each layer.

    Raises:
        PresetError: a layer does not exist, or as `check_together`.
    """
    for index, rule in enumerate(layers):
        for first, last in layer_ranges(rule.match):
            highest = first if last is None else last
            if highest >= num_layers:
                allowed = f"layers 0 to {num_layers - 1} (the model has {num_layers} layers)"
                raise refusal(f"layers[{index}].match", rule.match, f"there is no layer {highest}", allowed)
    check_together(settings, layers, steps, num_layers)


def attention_specs(
    settings: LayerSettings, layers: Sequence[LayerRule], steps: Sequence[StepRule], num_layers: int, errors: str
) -> tuple[AttentionSpec | None, ...]:
    """What each layer computes, None if it stays dense. Layers with the same rules share one object.

    Args:
        steps: the rules for steps that apply.
        errors: the error model that `auto` stands for.
    """
    applying = [_applying(layers, layer) for layer in range(num_layers)]
    rules = {indices: [*(layers[index] for index in indices), *steps] for indices in set(applying)}
    specs = {indices: _spec(settings, each, errors) for indices, each in rules.items()}
    return tuple(specs[indices] for indices in applying)


def token_orders(
    settings: LayerSettings, layers: Sequence[LayerRule], steps: Sequence[StepRule], num_layers: int
) -> tuple[TokenOrder, ...]:
    """The token order of each layer, also of layers that stay dense.

    Args:
        steps: the rules for steps that apply.
    """
    rules = [[*(layers[index] for index in _applying(layers, layer)), *steps] for layer in range(num_layers)]
    merged = [_merged(settings, each) for each in rules]
    return tuple(TokenOrder(each.order, each.tile) for each in merged)


def said_dense(rules: Sequence[Rule]) -> bool | None:
    """The `dense` of the last rule that has this key; None if none has it."""
    return next((rule.dense for rule in reversed(rules) if "dense" in rule.model_fields_set), None)


def _spec(settings: LayerSettings, rules: Sequence[Rule], errors: str) -> AttentionSpec | None:
    if said_dense(rules):
        return None
    merged = _merged(settings, rules)
    return AttentionSpec(
        block_query=merged.block.query,
        block_key=merged.block.key,
        levels=merged.levels,
        rule=merged.rule,
        thresholds=merged.thresholds,
        density=merged.density,
        floor=merged.floor,
        similarity=merged.similarity,
        importance=Importance(**dict(merged.importance)),
        rest=merged.rest,
        precision=merged.precision,
        error_model=errors if merged.error_model == "auto" else merged.error_model,
    )


def _merged(settings: LayerSettings, rules: Sequence[Rule]) -> LayerSettings:
    """The settings with the rules' changes, key by key, also inside `block` and `importance`. Later rules win."""
    merged: dict[str, Any] = {key: getattr(settings, key) for key in LayerSettings.model_fields}
    for rule in rules:
        for key in rule.model_fields_set & merged.keys():
            value = getattr(rule, key)
            if isinstance(value, BaseModel):
                changes = {name: getattr(value, name) for name in value.model_fields_set}
                value = merged[key].model_copy(update=changes)
            merged[key] = value
    return LayerSettings.model_construct(**merged)


def _applying(rules: Sequence[LayerRule], layer: int) -> tuple[int, ...]:
    return tuple(index for index, rule in enumerate(rules) if rule.covers(layer))


def _borders(rules: Sequence[LayerRule]) -> list[int]:
    """The layers at which the set of rules that apply changes, up to the highest layer that a rule names."""
    ranges = [part for rule in rules for part in layer_ranges(rule.match)]
    highest = max((first if last is None else last for first, last in ranges), default=0)
    borders = {first for first, _ in ranges} | {last + 1 for _, last in ranges if last is not None}
    return sorted(layer for layer in borders if layer <= highest)


def _told(found: Conflict, settings: LayerSettings, applying: Sequence[Placed]) -> PresetError:
    """The error for a conflict: it names the last rule that set one of the keys, or else the preset's first key."""
    culprits = ((place, rule, key) for place, rule in reversed(applying) for key in found.keys if _was_set(rule, key))
    value: Any
    place, value, key = next(culprits, ((), settings, found.keys[0]))
    for name in key:
        allowed = type(value).model_fields[name].description
        value = getattr(value, name)
    return refusal(dotted((*place, *key)), value, found.reason, allowed)


def _was_set(section: BaseModel, key: Key) -> bool:
    first, *inner = key
    return first in section.model_fields_set and (not inner or _was_set(getattr(section, first), tuple(inner)))
