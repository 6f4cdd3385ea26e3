"""The parts of a preset: their keys, which values are allowed, and the words for that (`description`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from psa_presets.steps import MAX_STEP, step_ranges

MAX_LAYERS = 1000
MAX_INTEGER = 2**31 - 1


def _as_tuple(value: Any) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return tuple(value)


def _one_of(*allowed: int) -> Callable[[int], int]:
    # A Literal would take 64.0 for 64.
    def check(value: int) -> int:
        if value not in allowed:
            raise ValueError("not one of these")
        return value

    return check


def _increasing(levels: tuple[int, ...]) -> tuple[int, ...]:
    if not levels or list(levels) != sorted(set(levels)):
        raise ValueError("not strictly increasing" if levels else "empty")
    return levels


def _cumulative(thresholds: tuple[float, ...]) -> tuple[float, ...]:
    if not thresholds or list(thresholds) != sorted(thresholds):
        raise ValueError("not sorted" if thresholds else "empty")
    if thresholds[-1] <= 0:
        raise ValueError("nothing would be attended")
    return thresholds


def _three(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if len(sizes) != 3:
        raise ValueError(f"{len(sizes)} numbers")
    return sizes


def _match_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("neither text nor an integer")
    if isinstance(value, int) and not 0 <= value < MAX_LAYERS:
        raise ValueError("out of range")
    layer_ranges(str(value))
    return str(value)


def _step_match_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("neither text nor an integer")
    if isinstance(value, int) and not 0 <= value <= MAX_STEP:
        raise ValueError("out of range")
    step_ranges(str(value))
    return str(value)


def _without_sign_of_zero(value: float) -> float:
    return value + 0.0  # -0.0 equals 0.0, and is written differently


def _share_or_steps(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("not finite")
        if not 0 <= value <= 1:
            whole = "" if value % 1 or value < 0 else ", and a number of steps is written without a point"
            raise ValueError(f"out of range{whole}")
        return _without_sign_of_zero(value)
    if not 0 <= value <= MAX_INTEGER:
        raise ValueError("out of range")
    return int(value) or 0.0  # zero steps equal a share of 0, so both give the same preset


def _tokens(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("neither auto nor an integer")
    if not 0 <= value <= MAX_INTEGER:
        raise ValueError("out of range")
    return value


def layer_ranges(match: str) -> list[tuple[int, int | None]]:
    """First and last layer of each part of a `match`; the last is None for an open range. ValueError if malformed."""
    ranges = []
    for part in match.split(","):
        found = re.fullmatch(r"\s*(?P<first>[0-9]{1,3})\s*(?P<dash>-\s*(?P<last>[0-9]{1,3})?\s*)?", part)
        if found is None:
            raise ValueError("not a list of layers")
        first = int(found["first"])
        last = int(found["last"]) if found["last"] else None if found["dash"] else first
        if last is not None and last < first:
            raise ValueError(f"{first}-{last} runs backwards")
        ranges.append((first, last))
    return ranges


Integer = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Positive = Annotated[Integer, Field(ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(_without_sign_of_zero)]
Share = Annotated[Number, Field(ge=0, le=1)]
# A float is a share of the steps, an integer a number of them: 1.0 is the whole run and 1 is one step.
ShareOrSteps = Annotated[int | float, BeforeValidator(_share_or_steps)]
MinTokens = Annotated[int | Literal["auto"], BeforeValidator(_tokens)]
Cosine = Annotated[Number, Field(ge=-1, le=1)]
AsTuple = BeforeValidator(_as_tuple)


class Section(BaseModel):
    """Base of every part: immutable, unknown keys are errors, and a part given as an object is checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", revalidate_instances="always")


class BlockSizes(Section):
    """Tokens per query block and per key block."""

    query: Annotated[Integer, AfterValidator(_one_of(32, 64, 128, 256))] = Field(
        default=128, description="32, 64, 128 or 256"
    )
    key: Annotated[Integer, AfterValidator(_one_of(16, 32, 64, 128, 256))] = Field(
        default=64, description="16, 32, 64, 128 or 256"
    )


class ImportanceSettings(Section):
    """How the importance of a key block for a query block is estimated; a stride of 8 samples every eighth token."""

    estimator: Literal["sampled", "pooled"] = Field(default="sampled", description="sampled or pooled")
    statistic: Literal["max", "mean"] = Field(default="max", description="max or mean")
    query_stride: Positive = Field(default=8, description="a positive integer that divides block.query")
    key_stride: Positive = Field(default=8, description="a positive integer that divides block.key")


class LayerSettings(Section):
    """What one layer's attention does: the part of a preset that rules for layers can change."""

    block: BlockSizes = Field(default=BlockSizes(), description="a mapping of query and key")
    levels: Annotated[tuple[Positive, ...], AsTuple, AfterValidator(_increasing)] = Field(
        default=(1, 2, 4), description="strictly increasing positive integers that each divide block.key"
    )
    rule: Literal["count", "mass", "budget"] = Field(default="count", description="count, mass or budget")
    thresholds: Annotated[tuple[Share, ...], AsTuple, AfterValidator(_cumulative)] = Field(
        default=(0.15, 0.25, 0.45),
        description="one number from 0 to 1 per level, none smaller than the one before, the last above 0",
    )
    density: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="null, or with the rule budget a number above 0 and up to 1"
    )
    floor: Share = Field(default=0.0, description="a number from 0 to 1")
    importance: ImportanceSettings = Field(
        default=ImportanceSettings(), description="a mapping of estimator, statistic, query_stride and key_stride"
    )
    similarity: Annotated[tuple[Cosine, ...], AsTuple] | None = Field(
        default=None, description="null, or one number from -1 to 1 per level after the first"
    )
    rest: Literal["skip", "mean"] = Field(default="skip", description="skip or mean")
    precision: Literal["native", "int8_qk"] = Field(default="native", description="native or int8_qk")
    error_model: Literal["tuned", "fitted", "auto"] = Field(default="tuned", description="tuned, fitted or auto")
    order: Literal["hilbert", "tiles", "raster"] = Field(default="hilbert", description="hilbert, tiles or raster")
    tile: Annotated[tuple[Positive, ...], AsTuple, AfterValidator(_three)] = Field(
        default=(4, 4, 4), description="three positive integers (time, height, width)"
    )


def _given_keys(section: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """What a section is dumped as, without the keys that were not given, also in the sections inside it."""
    given = {key: getattr(section, key) for key in dumped if key in section.model_fields_set}
    return {
        key: _given_keys(value, dumped[key]) if isinstance(value, BaseModel) else dumped[key]
        for key, value in given.items()
    }


class Rule(LayerSettings):
    """Changes for some layers or steps. Only keys that were given count: those in `model_fields_set`."""

    match: str
    dense: bool = Field(default=False, strict=True, description="true or false")

    # For pydantic a rule that gives a key's default value equals a rule without that key, and is dumped as it. For us
    # they differ.
    @model_serializer(mode="wrap")
    def _dump_given_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _given_keys(self, dump(self))

    def __eq__(self, other: object) -> bool:
        return self.model_dump() == other.model_dump() if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.match)


class LayerRule(Rule):
    """Changes for some layers."""

    match: Annotated[str, BeforeValidator(_match_text)] = Field(
        description=f"a layer, a range or a list of them (3, 0-1, 30- or 0,5,7-9), numbers up to {MAX_LAYERS - 1}"
    )

    def covers(self, layer: int) -> bool:
        """Whether the rule applies to a layer."""
        return any(first <= layer and (last is None or layer <= last) for first, last in layer_ranges(self.match))


class StepRule(Rule):
    """Changes for some steps of a run, in all layers."""

    match: Annotated[str, BeforeValidator(_step_match_text)] = Field(
        description="a step, a range or a list of them (3, 0-1, 4- or 0,5,7-9), or shares of the run (0-30%, 75%-), "
        f"steps up to {MAX_STEP}"
    )
