"""Preset: all settings of a run."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple, Self, Unpack

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from psa_kernels import AttentionSpec
from psa_presets.density import allocation_at
from psa_presets.errors import first_mistake, show, told_at
from psa_presets.fields import (
    MAX_LAYERS,
    AsTuple,
    LayerRule,
    LayerSettings,
    MinTokens,
    Positive,
    ShareOrSteps,
    StepRule,
)
from psa_presets.keys import PresetKeys
from psa_presets.layers import (
    TokenOrder,
    attention_specs,
    check_layers,
    check_together,
    said_dense,
    token_orders,
)
from psa_presets.steps import cells, possible_sets, rules_at

# `min_tokens: auto`: fewer tokens gain nothing on a CPU either (docs/benchmarks/cpu.json).
AUTO_MIN_TOKENS = 2048
# Videos are called <preset name>.mp4 and lie beside files of these names.
RESERVED_NAMES = ("dense", "side-by-side")
CHANGED = " (changed in code)"
SHARE_OR_STEPS = "a share of the steps from 0 to 1 (0.25, 1.0), or a whole number of steps (1, 4)"


def _usable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name):
        raise ValueError("not usable as a file name")
    if name.lower() in RESERVED_NAMES:
        raise ValueError("reserved")
    return name


class Preset(LayerSettings):
    """All settings of a run, checked when made. It is immutable; `replace` returns a changed copy.

    If a nested mapping (`block`, `importance`) leaves out a key, the key has its default; in a rule of `layers` or
    `steps` it keeps the preset's value.

    In `dense_steps` and `dense_last` a float is a share of the steps and an integer a number of steps: 1.0 keeps the
    whole run dense, 1 keeps one step dense.

    Raises:
        PresetError: one line that names the key, its value and what is allowed.
    """

    name: Annotated[str, Field(strict=True), AfterValidator(_usable_name)] = Field(
        default="custom",
        description="up to 64 letters, digits and . _ + -, a letter or digit first, not dense or side-by-side",
    )
    source: Annotated[str, Field(strict=True, max_length=500)] = Field(
        default="", description="text of up to 500 characters"
    )
    dense_steps: ShareOrSteps = Field(default=0.25, description=SHARE_OR_STEPS)
    dense_last: ShareOrSteps = Field(default=0.0, description=SHARE_OR_STEPS)
    refresh: Positive = Field(default=1, description="a positive integer")
    share_guidance: bool = Field(default=False, strict=True, description="true or false")
    correction: bool = Field(default=False, strict=True, description="true or false")
    min_tokens: MinTokens = Field(default="auto", description="auto, or an integer, 0 or more")
    dense_attention: Literal["stock", "psa"] = Field(default="stock", description="stock or psa")
    float32_on_gpu: Literal["dense", "sparse"] = Field(default="dense", description="dense or sparse")
    layers: Annotated[tuple[LayerRule, ...], AsTuple, Field(max_length=200)] = Field(
        default=(), description="a list of up to 200 mappings of match and the keys to change"
    )
    steps: Annotated[tuple[StepRule, ...], AsTuple, Field(max_length=20)] = Field(
        default=(), description="a list of up to 20 mappings of match and the keys to change"
    )

    _file: str = PrivateAttr("")  # where it was read, for messages; empty if it was made in code

    def __init__(self, /, **settings: Unpack[PresetKeys]) -> None:
        given: Any = settings  # pydantic checks and converts it
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise first_mistake(error, type(self)) from None
        check_together(self, self.layers, self.steps)

    # As text, because in Python one step (1) equals the share 1.0. What is kept of runs holds this dump too, and so
    # tells the same presets apart.
    def __eq__(self, other: object) -> bool:
        return self.model_dump_json() == other.model_dump_json() if isinstance(other, Preset) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @classmethod
    def from_file(cls, settings: Mapping[str, Any], file: str) -> Self:
        """Make a preset from a file's settings; error messages then name the file."""
        with told_at(file):
            preset = cls(**settings)
        preset._file = file
        return preset

    def replace(self, /, **changes: Unpack[PresetKeys]) -> Self:
        """Return a checked copy with other values for some keys. Values are as in YAML, or parts of a preset.

        Raises:
            PresetError: a key is unknown, a value is refused, or keys do not fit together.
        """
        settings: dict[str, Any] = {key: getattr(self, key) for key in self.model_fields_set}
        settings |= changes
        if self._file:
            return self.from_file(settings, self._file.removesuffix(CHANGED) + CHANGED)
        with told_at(self._place()):
            return type(self)(**settings)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy as pydantic does, but check changes as `replace` does."""
        if update:
            return self.replace(**{str(key): value for key, value in update.items()})
        return super().model_copy(deep=deep)

    def at_density(self, density: float) -> Self:
        """Return a copy whose sparse layers cost this share of what dense attention costs.

        With the rule `count`, thresholds and floor are multiplied by one factor and cut at 1. A call then has that
        density, up to rounding to whole blocks, text tokens not counted. With the rule `budget`, the key `density` is
        set.

        Args:
            density: above 0 and up to 1.

        Raises:
            PresetError: the density is out of reach; or it depends on the video (the rule `mass`, a `similarity`); or a
                rule of `layers` or `steps` gives some sparse layers or steps another density.
        """
        with told_at(self._place()):
            changes = allocation_at(self, {"layers": self.layers, "steps": self.steps}, density)
        return self.replace(**changes)

    def dense_step_count(self, num_steps: int) -> int:
        """How many of a run's first steps `dense_steps` keeps dense; a share is rounded up.

        Raises:
            ValueError: `num_steps` is negative.
        """
        steps = operator.index(num_steps)
        if steps < 0:
            raise ValueError(f"num_steps={num_steps!r}: expected 0 or more")
        return _count(self.dense_steps, steps)

    def dense_last_count(self, num_steps: int) -> int:
        """How many of a run's last steps `dense_last` keeps dense, not counting those that `dense_steps` keeps dense.

        Raises:
            ValueError: as `dense_step_count`.
        """
        first = self.dense_step_count(num_steps)
        return min(_count(self.dense_last, operator.index(num_steps)), operator.index(num_steps) - first)

    def sparse_steps(self, num_steps: int) -> tuple[int, ...]:
        """The steps of a run, counted from 0, that are sparse: neither the dense phase nor a rule keeps them dense.

        Raises:
            ValueError: as `dense_step_count`.
        """
        first, end = self.dense_step_count(num_steps), num_steps - self.dense_last_count(num_steps)
        return tuple(step for step in range(first, end) if not self._says_dense(self.step_rules_at(step, num_steps)))

    @property
    def is_all_dense(self) -> bool:
        """Whether no run of any length has a sparse step."""
        first, last = _parted(self.dense_steps), _parted(self.dense_last)
        # Of the runs that have a step in a cell, the longest has the fewest steps in its dense end beside it.
        return not any(
            self.dense_step_count(steps) <= step < steps - self.dense_last_count(steps)
            for cell in cells([rule.match for rule in self.steps], first.steps, first.share, 1 - last.share)
            if not self._says_dense(cell.rules)
            for step, steps in cell.longest_runs(last.steps)
        )

    @property
    def fewest_tokens(self) -> int:
        """Shorter sequences stay dense on every device: `min_tokens`, or what `auto` stands for."""
        return AUTO_MIN_TOKENS if self.min_tokens == "auto" else int(self.min_tokens)

    @property
    def may_undo_dense(self) -> bool:
        """Whether a layer that the rules for layers keep dense is sparse at some steps."""
        return any(said_dense([self.steps[index] for index in rules]) is False for rules in self._possible_step_rules())

    def step_rules_at(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Which of the rules in `steps`, by their places in the list, apply at a step of a run.

        Args:
            step: counted from 0.
            num_steps: how many steps the run has.

        Raises:
            ValueError: the run has no such step.
        """
        if not 0 <= operator.index(step) < operator.index(num_steps):
            raise ValueError(f"step={step!r}: expected 0 to {num_steps - 1}, as the run has {num_steps} steps")
        return rules_at([rule.match for rule in self.steps], step, num_steps)

    def layer_specs(
        self, num_layers: int, step_rules: Sequence[int] = (), *, corrected: bool = True
    ) -> tuple[AttentionSpec | None, ...]:
        """What each of a model's layers computes at a sparse step; None means that the layer stays dense.

        Args:
            step_rules: the rules for steps that apply, as `step_rules_at` gives them.
            corrected: whether what the layers leave out is added later, or no later step builds on it. Then
                `error_model: auto` is `fitted`, else `tuned`.

        Raises:
            PresetError: rules do not fit together, or one names a layer that the model lacks.
            ValueError: `num_layers` is not from 1 to 1000.
        """
        self._check_layers(num_layers)
        errors = "fitted" if corrected else "tuned"
        return attention_specs(self, self.layers, [self.steps[index] for index in step_rules], num_layers, errors)

    def layer_orders(self, num_layers: int, step_rules: Sequence[int] = ()) -> tuple[TokenOrder, ...]:
        """The token order of each of a model's layers.

        Args:
            step_rules: as for `layer_specs`.

        Raises:
            PresetError, ValueError: as `layer_specs`.
        """
        self._check_layers(num_layers)
        return token_orders(self, self.layers, [self.steps[index] for index in step_rules], num_layers)

    def _says_dense(self, step_rules: Sequence[int]) -> bool:
        return said_dense([self.steps[index] for index in step_rules]) is True

    def _possible_step_rules(self) -> tuple[tuple[int, ...], ...]:
        return possible_sets([rule.match for rule in self.steps])

    def _check_layers(self, num_layers: int) -> None:
        if not 1 <= operator.index(num_layers) <= MAX_LAYERS:
            raise ValueError(f"num_layers={num_layers!r}: expected 1 to {MAX_LAYERS}")
        with told_at(self._place()):
            check_layers(self, self.layers, self.steps, num_layers)

    def _place(self) -> str:
        return self._file or f"preset {show(self.name)}"


class _Parted(NamedTuple):
    """A `ShareOrSteps` as both, of which one is 0."""

    steps: int
    share: Fraction


def _parted(share_or_steps: float) -> _Parted:
    if isinstance(share_or_steps, int):
        return _Parted(share_or_steps, Fraction(0))
    # The decimal number that was meant: as floats, 0.3 and 0.7 do not add up to 1 exactly.
    return _Parted(0, Fraction(share_or_steps).limit_denominator(10**9))


def _count(share_or_steps: float, num_steps: int) -> int:
    """A share of the steps, rounded up, or as many of the steps as there are."""
    if isinstance(share_or_steps, int):
        return min(share_or_steps, num_steps)
    # 0.07 * 100 is a little more than 7 in floating point and must not become 8.
    return max(0, math.ceil(share_or_steps * num_steps - 1e-9))
