"""The transformers of a pipeline, and the attention modules of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from psa_diffusers.families import UnsupportedModelError

TRANSFORMERS = ("transformer", "transformer_2")


def find_transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by attribute name.

    Raises:
        UnsupportedModelError: it has none.
    """
    found = {name: module for name in TRANSFORMERS if (module := getattr(pipe, name, None)) is not None}
    # What `torch.compile(module)` returns stands for the module, whose hooks and processors it uses.
    found = {name: getattr(module, "_orig_mod", module) for name, module in found.items()}
    if not found:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer: it is no supported diffusers pipeline")
    return found


def attention_modules(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """All modules of a transformer that have an attention processor, of whatever kind of attention."""
    return (module for module in transformer.modules() if getattr(module, "processor", None) is not None)


def set_processor(attn: torch.nn.Module, processor: Any) -> None:
    """Set the processor of one attention module; Mochi's has no method for it."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor
