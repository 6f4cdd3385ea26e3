"""Preset: all settings of a run."""

from __future__ import annotations

import math
import operator
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, PrivateAttr, ValidationError

from psa_diffusers.presets.errors import PresetError, first_mistake, show
from psa_diffusers.presets.fields import MAX_LAYERS, AsTuple, Integer, LayerRule, LayerSettings, Positive, Share
from psa_diffusers.presets.layers import (
    TokenOrder,
    attention_specs,
    check_layers_exist,
    check_together,
    token_orders,
)
from psa_kernels import AttentionSpec

# Videos are called <preset name>.mp4 and stand beside files of these names.
RESERVED_NAMES = ("dense", "side-by-side")


def _usable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name):
        raise ValueError("not usable as a file name")
    if name.lower() in RESERVED_NAMES:
        raise ValueError("reserved")
    return name


class Preset(LayerSettings):
    """All settings of a run, checked when made and, since `model_copy` does not check what it changes, at each use.

    A nested mapping (`block`, `importance`) that leaves out a key gets that key's default; in a rule of `layers` it
    keeps what the preset says.

    Raises:
        PresetError: one line that names the key, its value and what is allowed.
    """

    name: Annotated[str, Field(strict=True), AfterValidator(_usable_name)] = Field(
        "custom",
        description="up to 64 letters, digits and . _ + -, a letter or digit first, not dense or side-by-side",
    )
    source: Annotated[str, Field(strict=True, max_length=500)] = Field("", description="text of up to 500 characters")
    dense_steps: Share = Field(0.25, description="a number from 0 to 1")
    refresh: Positive = Field(1, description="a positive integer")
    share_guidance: bool = Field(False, strict=True, description="true or false")
    min_tokens: Integer = Field(2048, description="an integer, 0 or more")
    layers: Annotated[tuple[LayerRule, ...], AsTuple, Field(max_length=200)] = Field(
        (), description="a list of up to 200 mappings of match and the keys to change"
    )

    # The place that messages name and what was read there: a later change was not made in that place.
    _origin: tuple[str, dict[str, Any]] | None = PrivateAttr(None)

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise first_mistake(error, type(self)) from None
        check_together(self, self.layers)

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if isinstance(other, Preset) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @classmethod
    def from_place(cls, settings: dict[str, Any], place: str) -> Preset:
        """Make a preset of what was read at a place (a file), which error messages then name."""
        try:
            preset = cls(**settings)
        except PresetError as error:
            raise error.at(place) from None
        preset._origin = (place, dict(preset.__dict__))
        return preset

    def validated(self) -> Preset:
        """The same preset checked anew; what `model_copy` was given as plain mappings and lists becomes typed.

        Raises:
            PresetError: a value is refused.
        """
        try:
            preset = Preset(**_given(self))
        except PresetError as error:
            raise error.at(self._place()) from None
        preset._origin = self._origin
        return preset

    def dense_step_count(self, num_steps: int) -> int:
        """How many of a run's first steps stay dense: the share `dense_steps` of them, rounded up.

        Raises:
            PresetError: the preset was changed to something invalid.
            ValueError: `num_steps` is negative.
        """
        steps = operator.index(num_steps)
        if steps < 0:
            raise ValueError(f"num_steps={num_steps!r}: expected 0 or more")
        # 0.07 * 100 is a little more than 7 in floating point and must not become 8.
        return max(0, math.ceil(self.validated().dense_steps * steps - 1e-9))

    def layer_specs(self, num_layers: int) -> tuple[AttentionSpec | None, ...]:
        """What each of a model's layers computes; None is a layer that stays dense.

        Raises:
            PresetError: a value is refused, rules do not fit together, or one names a layer that the model lacks.
            ValueError: `num_layers` is not from 1 to 1000.
        """
        preset = self._checked_for(num_layers)
        return attention_specs(preset, preset.layers, num_layers)

    def layer_orders(self, num_layers: int) -> tuple[TokenOrder, ...]:
        """In which order each of a model's layers has its tokens.

        Raises:
            PresetError, ValueError: as `layer_specs`.
        """
        preset = self._checked_for(num_layers)
        return token_orders(preset, preset.layers, num_layers)

    def _checked_for(self, num_layers: int) -> Preset:
        """This preset, checked anew, also against the number of layers."""
        if not 1 <= operator.index(num_layers) <= MAX_LAYERS:
            raise ValueError(f"num_layers={num_layers!r}: expected 1 to {MAX_LAYERS}")
        preset = self.validated()
        try:
            check_layers_exist(preset.layers, num_layers)
            check_together(preset, preset.layers, num_layers)
        except PresetError as error:
            raise error.at(self._place()) from None
        return preset

    def _place(self) -> str:
        if self._origin is None:
            return f"preset {show(self.name)}"
        place, settings = self._origin
        return place if self.__dict__ == settings else f"{place} (changed in code)"


def _given(section: BaseModel) -> dict[str, Any]:
    """What a model was given, as plain mappings and lists, whatever `model_copy` has put into it."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return _given(value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {str(key): plain(value) for key, value in section.__dict__.items() if key in section.model_fields_set}
