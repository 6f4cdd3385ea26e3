"""Noticing that a processor was set, which `set_attn_processor` tells nobody."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from psa_diffusers.patch.sites import PatchingProcessor


class Waiting:
    """A pre-hook on transformers: the first forward after their processor was set begins as any later one.

    Without it the first attention call would be what shows that. In a compiled block this is while it is traced, which
    would cost a graph for each processor. The processor is held by a weak reference, and the hooks go with it.
    """

    def __init__(self, processor: PatchingProcessor, transformers: Iterable[torch.nn.Module]) -> None:
        hook = _Hook(weakref.ref(processor))
        self._handles = [
            transformer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for transformer in transformers
        ]
        weakref.finalize(processor, self.stop).atexit = False

    def stop(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()


class _Hook:
    """What is copied or pickled with a transformer waits for nothing.

    Args:
        processor: None in a copy.
    """

    def __init__(self, processor: weakref.ref[PatchingProcessor] | None = None) -> None:
        self._processor = processor

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def __call__(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        # Where the whole transformer is compiled, the traced attention notices it; a call from here would break graphs.
        if torch.compiler.is_compiling() or self._processor is None:
            return
        # PyTorch gives no `kwargs` to a hook that one before it has removed.
        if kwargs is not None and (processor := self._processor()) is not None:
            processor.arrive(transformer, args, kwargs)
