"""Vision towers with full attention: every query reads every key, and there is no mask."""

from __future__ import annotations

from typing import Any

import torch

from psa_kernels import AttentionSpec, psa_attention
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import make_call
from psa_transformers.fallbacks import Fallbacks
from psa_transformers.layer_call import LayerCall
from psa_transformers.stats import Counter
from psa_transformers.stock import Stock


class TowerAttention:
    """Replaces a vision tower's attention function; transformers calls it once for each chunk of the tower's tokens.

    A tower's tokens stand in the order in which the tower has them; where that is one frame after the other, row by
    row, blocks of keys are strips of a frame. Its masks are those of before: a call with one is computed as before.
    """

    def __init__(
        self, stock: Stock, spec: AttentionSpec, fallbacks: Fallbacks, min_tokens: int, float32_on_gpu: bool
    ) -> None:
        self.counter = Counter()
        self._stock, self._spec, self._fallbacks = stock, spec, fallbacks
        self._min_tokens, self._float32_on_gpu = min_tokens, float32_on_gpu

    def mask(self, **arguments: Any) -> torch.Tensor | None:
        """As before."""
        return self._stock.mask(**arguments)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **arguments: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Attention of one layer or of one chunk of it: as `DecoderAttention.attend`, but not causal."""
        call = LayerCall(module, query, key, value, arguments)
        if query.shape[2] < self._min_tokens:
            return call.dense(self._stock, attention_mask)
        if torch.compiler.is_compiling():
            self._fallbacks.tell_traced("vision tower: a compiled forward")
            return call.dense(self._stock, attention_mask)
        reason = call.why_not(self._float32_on_gpu)
        if call.is_causal or attention_mask is not None:
            reason = "a mask"
        if reason is None and module.training:  # checkpointed layers are computed again with gradients
            reason = "training mode"
        if reason is None:
            reason = why_no_kernel(make_call(*call.rows(), self._spec, scale=call.scale))
        if reason is not None:
            self._fallbacks.tell(f"vision tower: {reason}")
            return call.dense(self._stock, attention_mask)
        strict, rows = self._fallbacks.strict, call.rows()
        out, stats = psa_attention(*rows, self._spec, scale=call.scale, strict=strict, return_stats=True)
        self.counter.note(0, [stats])
        return out, None
