"""Errors of presets: one line that names the place, the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


class PresetError(ValueError):
    """A preset cannot be used. The message is one line.

    Attributes:
        problem: the message without the place.
        place: the file, or the preset's name if it was made in code.
    """

    def __init__(self, problem: str, place: str = "preset") -> None:
        self.problem = one_line(problem)
        self.place = one_line(place, limit=400)
        super().__init__(problem, place)

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"

    def at(self, place: str) -> PresetError:
        """The same problem at another place."""
        return PresetError(self.problem, place)


@contextmanager
def told_at(place: str) -> Iterator[None]:
    """Let every PresetError raised inside name this place."""
    try:
        yield
    except PresetError as error:
        raise error.at(place) from None


def refusal(key: str, value: Any, reason: str, allowed: str) -> PresetError:
    """The error for one key whose value is refused."""
    return PresetError(f"{key} = {show(value)}: {reason}; allowed: {allowed}")


def first_mistake(error: ValidationError, model: type[BaseModel]) -> PresetError:
    """The first mistake that pydantic found. An unknown key goes first, because it often causes the others."""
    mistake = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    location, value = mistake["loc"], mistake["input"]
    key = one_line(dotted(location), limit=80)
    if mistake["type"] == "extra_forbidden":
        known = list(_find(model, location[:-1])[0].model_fields)
        close = difflib.get_close_matches(str(location[-1]).lower(), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return refusal(key, value, f"unknown key{hint}", ", ".join(known))
    if mistake["type"] == "missing":
        return PresetError(f"{key} is missing; allowed: {_find(model, location)[1]}")
    return refusal(key, value, _reason(mistake), _find(model, location)[1])


def dotted(location: Iterable[str | int]) -> str:
    """`layers[1].thresholds` for ("layers", 1, "thresholds")."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def show(value: Any) -> str:
    """A value as in YAML, shortened to fit into a line."""
    return one_line(_SHORT.repr(value), limit=120)


def one_line(text: str, limit: int = 2000) -> str:
    """The text without line breaks and control characters, cut to a length."""
    text = "".join(character if character.isprintable() else " " for character in text[: 2 * limit])
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _reason(mistake: Mapping[str, Any]) -> str:
    kind = mistake["type"]
    if kind == "value_error":
        return str(mistake["ctx"]["error"])
    if kind == "finite_number":
        return "not finite"
    if kind in ("greater_than_equal", "less_than_equal"):
        return "out of range"
    if kind == "literal_error":
        return "not one of these"
    if kind.endswith("_type"):
        return f"wrong type ({_kind(mistake['input'])})"
    return mistake["msg"]


def _kind(value: Any) -> str:
    kinds = {str: "text", bool: "true or false", int: "integer", float: "number", dict: "mapping", list: "list"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def _find(model: type[BaseModel], location: Iterable[str | int]) -> tuple[type[BaseModel], str]:
    """The innermost section on the way to a location, and the description of the innermost known field."""
    allowed = ""
    for part in location:
        if isinstance(part, int):  # a place in a list
            continue
        field = model.model_fields.get(part)
        if field is None:
            break
        allowed = field.description or ""
        kinds = (field.annotation, *get_args(field.annotation))
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return model, allowed


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 8
        self.maxstring = self.maxother = 60
        self.maxlong = 24

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print integers of thousands of digits.
        return (
            f"an integer of {value.bit_length()} bits" if value.bit_length() > 256 else super().repr_int(value, level)
        )

    def repr_tuple(self, value: tuple, level: int) -> str:
        return self.repr_list(list(value), level)

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


_SHORT = _Short()
