"""The names of implementations that patched models have, and the functions that transformers finds under them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from psa_transformers.stock import Stock


class Implementation(Protocol):
    """What computes attention under a name."""

    def attend(self, module: torch.nn.Module, *tensors: Any, **arguments: Any) -> tuple[torch.Tensor, Any]: ...

    def mask(self, **arguments: Any) -> torch.Tensor | None: ...


class Name:
    """A name, which one patch after another has.

    Compiled graphs check the name and the functions that they were traced with. So these stay registered from their
    first patch on, and the next patch gets them again: graphs of the last one go on. A model with a copy of a patched
    configuration has the name too, and without a patch gets the attention that the last model had before.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.stock = Stock(None)
        self._current: Implementation = self.stock
        self._owner: Callable[[], PreTrainedModel | None] = lambda: None
        AttentionInterface.register(text, self._attend)
        AttentionMaskInterface.register(text, self._mask)

    @property
    def is_free(self) -> bool:
        """Whether no patch has it, or only that of a model that is gone."""
        return self._current is self.stock or self._owner() is None

    def was_of(self, part: PreTrainedModel) -> bool:
        """Whether a part of a model was the last that had it."""
        return self._owner() is part

    def give(self, part: PreTrainedModel, current: Implementation, stock: Stock) -> None:
        """Let a patch have it."""
        self._owner, self._current, self.stock = weakref.ref(part), current, stock

    def give_back(self) -> None:
        """The patch has ended."""
        self._current = self.stock

    def _attend(self, module: torch.nn.Module, *tensors: Any, **arguments: Any) -> tuple[torch.Tensor, Any]:
        return self._current.attend(module, *tensors, **arguments)

    def _mask(self, **arguments: Any) -> torch.Tensor | None:
        return self._current.mask(**arguments)


_names: dict[str, Name] = {}
_lock = threading.Lock()


def named(text: str | None) -> Name | None:
    """The name of a patch that a text is; None if it is none."""
    return None if text is None else _names.get(text)


def take(part: PreTrainedModel, current: Implementation, stock: Stock) -> Name:
    """A free name for a part of a model, rather that which it had last.

    Args:
        current: what computes its attention from now on.
        stock: its attention of before.
    """
    with _lock:
        free = [name for name in _names.values() if name.is_free]
        chosen = next((name for name in free if name.was_of(part)), free[0] if free else None)
        if chosen is None:
            chosen = Name(f"psa_{len(_names) + 1}")
            _names[chosen.text] = chosen
        chosen.give(part, current, stock)
        return chosen
