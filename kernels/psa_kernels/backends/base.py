"""What every backend has to say of itself and to compute."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from psa_kernels.call import Call
from psa_kernels.causal.attention import dense_causal_attention
from psa_kernels.lists import BlockLists


class Backend(ABC):
    """The two halves of the operator, and the pyramid that both may use.

    Attributes:
        name: what `AttentionStats.implementation` calls it.
        implementation: what the argument `implementation` of `psa_attention` calls it; several backends may share it,
            each for precisions of its own.
        precisions: those of the spec that it computes. What computes natively may stand in for another.
        devices: types of device on which `auto` looks at it.
        has_pyramid: whether it pools the keys of all heads before it attends; else `attend` pools head by head.
    """

    name: str
    implementation: str
    precisions: tuple[str, ...] = ("native",)
    devices: tuple[str, ...] = ("cuda",)
    has_pyramid: bool = True

    def pays(self, call: Call) -> bool:
        """Whether `auto` should take it on this GPU for this much work; if not, it goes on without a warning."""
        return True

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """The reason why it cannot serve a call, in one line, or None. Asked at every call, so it has to be cheap."""

    def pyramid_rows(self, call: Call) -> int:
        """Rows that the pyramid of one head of the keys has, its keys and its values each."""
        raise NotImplementedError(f"{self.name} says that it has a pyramid, but not of how many rows")

    def pool_keys(self, call: Call, selects: bool, alone: bool = False) -> Any:
        """The pyramid of keys, whatever that is here, and of values if it likes.

        Args:
            selects: whether `select` will be given it.
            alone: whether it is that of all heads, so that there is memory for values too before `attend`.
        """
        raise NotImplementedError(f"{self.name} says that it has a pyramid, but pools no keys")

    @abstractmethod
    def select(self, call: Call, keys: Any) -> BlockLists:
        """Which key blocks every query block reads; `keys` is what `pool_keys` returned, or None."""

    @abstractmethod
    def attend(self, call: Call, keys: Any, lists: BlockLists, out: torch.Tensor) -> None:
        """Pool the values and fill the rows of video queries of `out`, `[B, Nq, H, D]`."""

    def attend_causal_text(self, call: Call, parts: Sequence[slice], out: torch.Tensor) -> None:
        """Let some of the queries of a causal call attend all keys that are not later, and fill their rows of `out`."""
        for part in parts:
            seen = call.k.shape[1] - call.q.shape[1] + part.stop
            queries, keys, values = call.q[:, part], call.k[:, :seen], call.v[:, :seen]
            out[:, part] = dense_causal_attention(queries, keys, values, call.scale)
