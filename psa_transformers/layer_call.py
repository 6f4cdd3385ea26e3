"""One call of an attention function by transformers, and why PSA may not be able to serve it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from psa_kernels.devices import is_autocast_enabled
from psa_transformers.prefill import Part, Prefill
from psa_transformers.refusals import why_not_arguments, why_not_tensors
from psa_transformers.stock import Stock

FLOAT32 = "float32 on a GPU, which the preset keeps dense (float32_on_gpu)"


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The arguments of an attention function, except the mask.

    Attributes:
        query, key, value: `[B, Hq, Nq, D]` and twice `[B, Hkv, Nk, D]`.
        arguments: the rest, by name.
    """

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        told = self.arguments.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if told is None else told)

    @property
    def scale(self) -> float | None:
        return self.arguments.get("scaling")

    @cached_property
    def computed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value as SDPA would compute with them; under autocast they may come in several dtypes."""
        q, k, v = self.query, self.key, self.value
        if q.dtype == torch.float64 or not is_autocast_enabled(q.device):
            return q, k, v
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def dense(self, stock: Stock, mask: Any) -> tuple[torch.Tensor, Any]:
        """What the module would have computed with a mask, which is brought to its device."""
        mask = mask.to(self.query.device) if isinstance(mask, torch.Tensor) else mask
        return stock.attend(self.module, self.query, self.key, self.value, mask, **self.arguments)

    def why_not(self, float32_on_gpu: bool) -> str | None:
        """Why the operator cannot compute the call, whatever the mask; None if it can."""
        reason = why_not_arguments(self.arguments) or why_not_tensors(self.query, self.key, self.value)
        is_float32 = self.query.is_cuda and self.computed[0].dtype == torch.float32
        return FLOAT32 if reason is None and is_float32 and not float32_on_gpu else reason

    def rows(
        self, prefill: Prefill | None = None, part: Part | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens of a part, or all, as the operator reads them: views `[B, N, heads, D]`."""
        q, k, v = self.computed
        if prefill is not None and part is not None:
            first = max(part.first_key - prefill.first_query, 0)
            q = q[part.items, :, first : part.end - prefill.first_query]
            k, v = k[part.items, :, part.first_key : part.end], v[part.items, :, part.first_key : part.end]
        return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()
