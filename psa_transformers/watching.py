"""Hooks on a decoder and the models around it, which only look."""

from __future__ import annotations

from typing import Any

import torch

from psa_transformers.patch import DecoderAttention
from psa_transformers.running import Running, StaysHere
from psa_transformers.spans import VisionTokens


class Watch(StaysHere):
    """What is looked at before and after each forward of one of these models."""

    def __init__(
        self, depth: int, is_decoder: bool, running: Running, seen: VisionTokens, attention: DecoderAttention
    ) -> None:
        """
        Args:
            depth: as of `Running`.
        """
        self._depth, self._is_decoder = depth, is_decoder
        self._running, self._seen, self._attention = running, seen, attention

    def put_on(self, part: torch.nn.Module) -> tuple[Any, Any]:
        """Register the hooks.

        Neither is called after an error (`always_call`): graphs check the numbers of such hooks, which each patch has
        anew.
        """
        before = part.register_forward_pre_hook(self._before, with_kwargs=True)
        return before, part.register_forward_hook(self._after)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._running.enter(self._depth):
            self._forget()
        self._seen.before(module, args, kwargs)
        if self._is_decoder:
            self._attention.begin()

    def _after(self, _module: Any, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._is_decoder:
            self._seen.after(output)
            self._forget()
        self._running.leave(self._depth)

    def _forget(self) -> None:
        self._seen.forget()
        self._attention.end()
