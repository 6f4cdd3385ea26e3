"""The model families: where queries, keys, values, positions and text are in their attention.

A family is a file of this folder with a subclass of `ModelFamily`, found by walking the folder. Beside the class it
says what the commands know of its checkpoints, if they know any: `PIPELINES`, the classes of its pipelines by name, and
`CARDS`, the models that `--model` knows by a short name.

Family files import PyTorch and diffusers inside functions only: commands print their help and lists without them.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from psa_diffusers.families.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.families.lookup import UnsupportedModelError, family_of

__all__ = [
    "FAMILIES",
    "MODULES",
    "AttentionCall",
    "DenseOnlyError",
    "ModelFamily",
    "UnsupportedModelError",
    "find_family",
]


def _classes(module: ModuleType) -> list[type[ModelFamily]]:
    """The families that a file defines, without those that it imports."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return [kind for kind in kinds if issubclass(kind, ModelFamily) and kind is not ModelFamily]


def _place(module: ModuleType) -> list[tuple[int, str]]:
    """Where it is listed; a relative of another family has not its order."""
    return [(vars(family).get("order", ModelFamily.order), family.name) for family in _classes(module)]


_WALKED = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
MODULES: tuple[ModuleType, ...] = tuple(sorted(filter(_classes, _WALKED), key=_place))
FAMILIES: tuple[type[ModelFamily], ...] = tuple(family for module in MODULES for family in _classes(module))


def find_family(transformer: object) -> type[ModelFamily]:
    """The family of a transformer.

    A subclass is what its base class is, as long as it has the base's forward: FSDP2's `fully_shard` makes such ones.

    Raises:
        UnsupportedModelError: names the transformer's class, why it is not supported, and what is.
    """
    return family_of(type(transformer), FAMILIES)
