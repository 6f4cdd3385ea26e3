"""What a patch has replaced, for as long as that may come back."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch


class Replaced:
    """The processors of earlier patches by the modules that had them, whose references are weak.

    Held by the handle of a patch alone. If its processor held it, patches that replace each other would all stay.
    """

    def __init__(self, processors: Mapping[torch.nn.Module, Any]) -> None:
        self._pairs = [(weakref.ref(attn), processor) for attn, processor in processors.items()]

    def take(self) -> list[tuple[torch.nn.Module, Any]]:
        """The modules that there still are, with their processors, which are forgotten here."""
        pairs, self._pairs = self._pairs, []
        return [(attn, processor) for ref, processor in pairs if (attn := ref()) is not None]
