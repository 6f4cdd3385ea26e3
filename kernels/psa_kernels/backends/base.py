"""The interface of a backend: what it says about itself, and what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from psa_kernels.call import Call
from psa_kernels.causal.attention import dense_causal_attention
from psa_kernels.lists import BlockLists


class Backend(ABC):
    """Computes the two halves of the operator, `select` and `attend`, and the pyramid that both may use.

    Attributes:
        name: its name in `AttentionStats.implementation`.
        implementation: its name in the argument `implementation` of `psa_attention`. Several backends may share one,
            each for precisions of its own.
        precisions: the spec's precisions that it computes. A backend that computes natively may stand in for others.
        devices: types of device on which `auto` considers it.
        has_pyramid: whether it pools the keys of all heads before it attends. If not, `attend` pools head by head.
    """

    name: str
    implementation: str
    precisions: tuple[str, ...] = ("native",)
    devices: tuple[str, ...] = ("cuda",)
    has_pyramid: bool = True

    def pays(self, call: Call) -> bool:
        """Whether `auto` should take it on this GPU for this much work. If not, `auto` goes on without a warning."""
        return True

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """Why it cannot serve a call, in one line, or None if it can. Asked at every call, so it has to be cheap."""

    def pyramid_rows(self, call: Call) -> int:
        """How many rows the pyramid of one key head has, for keys and for values each."""
        raise NotImplementedError(f"{self.name} says that it has a pyramid, but not of how many rows")

    def pool_keys(self, call: Call, selects: bool, alone: bool = False) -> Any:
        """Make the pyramid of keys, in a form of the backend's own; it may pool the values already.

        It may return None, where `select` needs no pyramid and `attend` makes it.

        Args:
            selects: whether `select` will get it.
            alone: whether it is made for all heads at once. Then there is memory for values before `attend` too. Of
                some of the heads they may be there as well, if the selection reads them anyway.
        """
        raise NotImplementedError(f"{self.name} says that it has a pyramid, but pools no keys")

    @abstractmethod
    def select(self, call: Call, keys: Any) -> BlockLists:
        """Which key blocks every query block reads; `keys` is what `pool_keys` returned, or None."""

    @abstractmethod
    def attend(self, call: Call, keys: Any, lists: BlockLists, out: torch.Tensor) -> None:
        """Pool what `keys`, as for `select`, lacks, and fill the rows of video queries of `out`, `[B, Nq, H, D]`."""

    def attend_causal_text(self, call: Call, parts: Sequence[slice], out: torch.Tensor) -> None:
        """Let the queries in `parts` of a causal call attend all keys that are not later; fill their rows of `out`."""
        for part in parts:
            seen = call.k.shape[1] - call.q.shape[1] + part.stop
            queries, keys, values = call.q[:, part], call.k[:, :seen], call.v[:, :seen]
            out[:, part] = dense_causal_attention(queries, keys, values, call.scale)
