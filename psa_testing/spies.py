"""What tests look at inside a patched pipeline's attention, and how they spoil it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from psa_diffusers.patch import attend, text_padding
from psa_diffusers.patch.attend import TokenAttention


def count_selections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, one entry a choice of key blocks."""
    calls: list[int] = []
    attention, select = text_padding.psa_attention, text_padding.select_blocks

    def attended(*arguments: Any, lists: Any = None, **settings: Any) -> Any:
        if lists is None:
            calls.append(1)
        return attention(*arguments, lists=lists, **settings)

    def selected(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return select(*arguments, **settings)

    monkeypatch.setattr(text_padding, "psa_attention", attended)
    monkeypatch.setattr(text_padding, "select_blocks", selected)
    return calls


@contextmanager
def feigned_capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who asks is told that a CUDA graph is being captured; values are those of an eager forward."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield


def spy_on_attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """From now on, of every sparse call its queries, keys and values, its settings, and what came out."""
    calls: list[tuple[Any, Any, Any]] = []
    original = attend.attend_real_text

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Any, lists: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Any, Any]:
        result = original(q, k, v, spec, lists, **options)
        calls.append(((q, k, v), options, result[:3]))
        return result

    monkeypatch.setattr(attend, "attend_real_text", spy)
    return calls


def spoil_sparse(
    monkeypatch: pytest.MonkeyPatch,
    value: float = float("nan"),
    layers: tuple[str, ...] | list[str] = ("blocks.2",),
    steps: tuple[int, ...] = (2,),
) -> list[tuple[str, int]]:
    """From now on, the sparse output of some layers is not finite at some steps; returns the sparse attentions."""
    calls: list[tuple[str, int]] = []
    sparse = TokenAttention.sparse

    def spoiled(self: TokenAttention, layer: Any, forward: Any, *arguments: Any) -> Any:
        (head, tail), stats = sparse(self, layer, forward, *arguments)
        calls.append((layer.name, forward.step))
        if layer.name in layers and forward.step in steps:
            head[:, 0, 0, 0] = value
        return (head, tail), stats

    monkeypatch.setattr(TokenAttention, "sparse", spoiled)
    return calls
