"""The attention that a model had before it was patched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Stock:
    """The function and the masks of an attention implementation, found where transformers would find them.

    Attributes:
        name: as in the model's configuration.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name or "eager"

    def attend(self, module: torch.nn.Module, *tensors: Any, **arguments: Any) -> tuple[torch.Tensor, Any]:
        """What the module would have computed."""
        return self._function(module)(module, *tensors, **arguments)

    def mask(self, **arguments: Any) -> torch.Tensor | None:
        """The mask that the model would have made; implementations without a maker of masks have none."""
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(self.name)
        return None if make is None else make(**arguments)

    def _function(self, module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
        # The files of models have an eager function of their own, and may have a registry of their own.
        homes = [sys.modules[kind.__module__] for kind in type(module).__mro__]
        if self.name == "eager":
            return next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
        registries = [getattr(home, "ALL_ATTENTION_FUNCTIONS", None) for home in homes]
        registry = next((each for each in registries if each is not None), ALL_ATTENTION_FUNCTIONS)
        return registry[self.name]
