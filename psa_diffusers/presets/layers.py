"""From a preset's settings and its rules for layers to what each layer does, and the checks that need several keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from psa_diffusers.presets.errors import PresetError, dotted, refusal
from psa_diffusers.presets.fields import LayerRule, LayerSettings, layer_ranges
from psa_kernels import AttentionSpec, Importance


class TokenOrder(NamedTuple):
    """In which order a layer's tokens are cut into blocks: `order` and `tile` of a preset."""

    order: str
    tile: tuple[int, ...]


class Conflict(NamedTuple):
    """Keys that do not fit together: the one to name first, then those that can be at fault as well."""

    keys: tuple[tuple[str, ...], ...]
    reason: str


def conflict(settings: LayerSettings) -> Conflict | None:
    """The first disagreement between valid values, or None."""
    levels, thresholds, similarity = settings.levels, settings.thresholds, settings.similarity
    block, importance = settings.block, settings.importance
    for level in levels:
        if block.key % level:
            return Conflict((("levels",), ("block", "key")), f"level {level} does not divide block.key = {block.key}")
    budget = settings.rule == "budget"
    if budget and settings.density is None:
        return Conflict((("rule",), ("density",)), "the rule budget needs a density")
    if budget and settings.rest == "mean" and settings.density * block.key < 1:
        keys = (("density",), ("rest",), ("block", "key"))
        return Conflict(keys, f"the mean tokens alone are 1 / {block.key} of dense attention")
    if budget and (settings.floor or similarity is not None):
        key = "floor" if settings.floor else "similarity"
        return Conflict(((key,), ("rule",)), f"the rule budget takes no {key}")
    if settings.density is not None and not budget:
        return Conflict((("density",), ("rule",)), f"the rule {settings.rule} takes no density")
    if len(thresholds) != len(levels) and not budget:
        reason = f"thresholds has length {len(thresholds)}, levels {list(levels)} needs {len(levels)}"
        return Conflict((("thresholds",), ("levels",)), reason)
    if similarity is not None and len(similarity) != len(levels) - 1:
        reason = f"similarity has length {len(similarity)}, levels {list(levels)} needs {len(levels) - 1}"
        return Conflict((("similarity",), ("levels",)), reason)
    for side in ("query", "key"):
        stride, size = getattr(importance, f"{side}_stride"), getattr(block, side)
        if size % stride:
            keys = (("importance", f"{side}_stride"), ("block", side))
            return Conflict(keys, f"a stride of {stride} does not divide block.{side} = {size}")
    return None


def check_together(settings: LayerSettings, rules: Sequence[LayerRule], num_layers: int | None = None) -> None:
    """Check the settings, and what they become in each layer; without a number of layers, in those that rules name.

    Raises:
        PresetError: keys that are each valid do not fit together; it names the last of them that was set.
    """
    found = conflict(settings)
    if found:
        raise _told(found, found.keys[0], settings)
    layers = _borders(rules) if num_layers is None else range(num_layers)
    for applying in {_applying(rules, layer): None for layer in layers}:
        found = conflict(_merged(settings, [rules[index] for index in applying]))
        if found:
            index, key = _culprit(found, rules, applying)
            raise _told(found, key, rules[index], ("layers", index))


def check_layers_exist(rules: Sequence[LayerRule], num_layers: int) -> None:
    """Check that every layer that a rule names is there.

    Raises:
        PresetError: one is not.
    """
    for index, rule in enumerate(rules):
        for first, last in layer_ranges(rule.match):
            highest = first if last is None else last
            if highest >= num_layers:
                allowed = f"layers 0 to {num_layers - 1} (the model has {num_layers} layers)"
                raise refusal(f"layers[{index}].match", rule.match, f"there is no layer {highest}", allowed)


def attention_specs(
    settings: LayerSettings, rules: Sequence[LayerRule], num_layers: int
) -> tuple[AttentionSpec | None, ...]:
    """What each layer computes, None where it stays dense; layers alike share one object."""
    applying = [_applying(rules, layer) for layer in range(num_layers)]
    specs = {indices: _spec(settings, [rules[index] for index in indices]) for indices in set(applying)}
    return tuple(specs[indices] for indices in applying)


def token_orders(settings: LayerSettings, rules: Sequence[LayerRule], num_layers: int) -> tuple[TokenOrder, ...]:
    """In which order each layer has its tokens, also where it stays dense."""
    merged = [_merged(settings, [rules[index] for index in _applying(rules, layer)]) for layer in range(num_layers)]
    return tuple(TokenOrder(each.order, each.tile) for each in merged)


def _spec(settings: LayerSettings, rules: Sequence[LayerRule]) -> AttentionSpec | None:
    said = [rule.dense for rule in rules if "dense" in rule.model_fields_set]
    if said and said[-1]:
        return None
    merged = _merged(settings, rules)
    return AttentionSpec(
        block_query=merged.block.query,
        block_key=merged.block.key,
        levels=merged.levels,
        rule=merged.rule,
        thresholds=merged.thresholds,
        density=merged.density if merged.rule == "budget" else None,
        floor=merged.floor,
        similarity=merged.similarity,
        importance=Importance(**dict(merged.importance)),
        rest=merged.rest,
        precision=merged.precision,
    )


def _merged(settings: LayerSettings, rules: Sequence[LayerRule]) -> LayerSettings:
    """The settings with the rules' changes, key by key also inside `block` and `importance`; later ones win."""
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
    """The layers where another set of rules begins to apply, up to the highest that a rule names."""
    ranges = [part for rule in rules for part in layer_ranges(rule.match)]
    highest = max((first if last is None else last for first, last in ranges), default=0)
    borders = {first for first, _ in ranges} | {last + 1 for _, last in ranges if last is not None}
    return sorted(layer for layer in borders if layer <= highest)


def _culprit(found: Conflict, rules: Sequence[LayerRule], applying: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """The last rule that set one of the keys, and which. There is one: without rules there was no conflict."""
    return next(
        (index, key)
        for index in reversed(applying)
        for key in found.keys
        if key[0] in rules[index].model_fields_set
        and all(name in getattr(rules[index], key[0]).model_fields_set for name in key[1:])
    )


def _told(found: Conflict, key: tuple[str, ...], section: BaseModel, place: tuple[str | int, ...] = ()) -> PresetError:
    value: Any = section
    for name in key:
        allowed = type(value).model_fields[name].description
        value = getattr(value, name)
    return refusal(dotted((*place, *key)), value, found.reason, allowed)
