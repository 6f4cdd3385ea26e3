"""Names of the arguments of attention processors: which ones diffusers may pass to ours, and which the others take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from psa_diffusers.families import FAMILIES

Call = TypeVar("Call", bound=Callable[..., Any])

_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def with_names(call: Call) -> Call:
    """Give a processor's `__call__` a signature that names all arguments of all families' processors.

    diffusers passes on only those arguments that it finds in the signature.
    """
    names = ("self", "attn", *dict.fromkeys(name for family in FAMILIES for name in family.arguments))
    either, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    first = [inspect.Parameter(name, either) for name in names[:3]]
    others = [inspect.Parameter(name, by_name, default=None) for name in names[3:]]
    vars(call)["__signature__"] = inspect.Signature([*first, *others])
    return call


def argument_names(processor: Any) -> tuple[str, ...] | None:
    """Names of the arguments that a processor takes after the attention module, in order; None if it takes any."""
    kind: Any = type(processor)
    return _names_of(kind)


@functools.cache
def _names_of(kind: Any) -> tuple[str, ...] | None:
    try:
        parameters = list(inspect.signature(kind.__call__).parameters.values())[2:]
    except (TypeError, ValueError):
        return None
    return tuple(each.name for each in parameters) if all(each.kind in _KINDS for each in parameters) else None
