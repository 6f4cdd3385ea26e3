"""The transformers of a pipeline, and the attention modules of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from psa_diffusers.families import UnsupportedModelError
from psa_diffusers.families.lookup import REASONS

TRANSFORMERS = ("transformer", "transformer_2", "transformer_ref")
# Transformers of a workflow of their own, which has nothing to do with the others; experts share every run.
OF_OTHER_WORKFLOWS = ("transformer_ref",)


def unwrapped(module: Any) -> Any:
    """The module inside of what `torch.compile(module)` returns, which uses the module's hooks and processors."""
    return getattr(module, "_orig_mod", module)


def find_transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by attribute name; one that has two names is listed under the first.

    Raises:
        UnsupportedModelError: it has none.
    """
    found: dict[str, torch.nn.Module] = {}
    for name in TRANSFORMERS:
        module = unwrapped(getattr(pipe, name, None))
        if module is not None and all(module is not other for other in found.values()):
            found[name] = module
    if not found and hasattr(pipe, "load_components"):  # a modular pipeline
        raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer yet: call pipe.load_components() first")
    if not found:
        unet = type(unwrapped(getattr(pipe, "unet", None))).__name__
        why = f"it has a {unet}, and {REASONS[unet]}" if unet in REASONS else "it is no supported diffusers pipeline"
        raise UnsupportedModelError(f"{type(pipe).__name__} has no transformer: {why}")
    return found


def attention_modules(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """All modules of a transformer that have an attention processor, of whatever kind of attention."""
    return (module for module in transformer.modules() if getattr(module, "processor", None) is not None)


def set_processor(attn: Any, processor: Any) -> None:
    """Set the processor of one attention module; Mochi's has no method for it."""
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:
        attn.processor = processor
