"""The attention function and the masks that a patched decoder uses."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from psa_kernels import AttentionSpec, psa_attention
from psa_kernels.backends.served import why_no_kernel
from psa_kernels.call import make_call
from psa_transformers.compiled import COMPILED
from psa_transformers.fallbacks import Fallbacks, Unserved
from psa_transformers.layer_call import LayerCall
from psa_transformers.prefill import Part, Prefill
from psa_transformers.refusals import NOT_OURS, TOLD, is_quantised, why_not_mask
from psa_transformers.spans import VisionTokens
from psa_transformers.stats import Counter
from psa_transformers.stock import Stock

NOT_ITS_LAYER = "a layer that is not the patched model's, as of another model that shares its configuration"
CHECKPOINTED = "gradient checkpointing, which computes layers again for their gradients"


class _Forward(threading.local):
    """The forward that a thread runs.

    Attributes:
        prefill: what was made for a mask last.
        verdict: why it gets its masks of before; empty if it is too short, None if no mask was asked for.
        wants_gradient: whether one was, where the decoder began.
    """

    prefill: Prefill | None = None
    verdict: str | None = None
    wants_gradient = False


class DecoderAttention:
    """Replaces a decoder's attention function, and the function that makes its masks.

    A forward that may be sparse gets a marker (`Prefill`) as its mask. All others get the mask that they had before,
    so that they are computed as before.

    Attributes:
        prefills, calls, counter: for `PrefillStats`.
    """

    def __init__(
        self,
        decoder: torch.nn.Module,
        stock: Stock,
        specs: Sequence[AttentionSpec | None],
        vision: VisionTokens,
        fallbacks: Fallbacks,
        min_tokens: int,
        dense_last: int,
        float32_on_gpu: bool,
    ) -> None:
        self.prefills = self.calls = 0
        self.counter = Counter()
        self._stock, self._specs, self._vision, self._fallbacks = stock, specs, vision, fallbacks
        self._min_tokens, self._dense_last, self._float32_on_gpu = min_tokens, dense_last, float32_on_gpu
        self._forward, self._lock = _Forward(), threading.Lock()
        self._layers = weakref.WeakSet(decoder.modules())

    def begin(self) -> None:
        """The decoder's forward begins."""
        self._forward.wants_gradient = torch.is_grad_enabled()

    def end(self) -> None:
        """It has ended: what was known of it is gone."""
        self._forward.prefill = self._forward.verdict = None

    def may_be_sparse(self, queries: int, tokens: int) -> bool:
        """Whether a forward may be, by the number of its tokens and of those in the cache after it."""
        return queries > max(self._dense_last, 1) and tokens >= self._min_tokens

    def mask(self, **arguments: Any) -> torch.Tensor | None:
        """The mask of one forward, with the arguments of transformers' own makers of masks."""
        queries = arguments["q_length"]
        if torch.compiler.is_compiling():
            valid, past = arguments.get("attention_mask"), arguments.get("q_offset", 0)
            known = queries + (past if isinstance(past, int) else 0)  # a static cache keeps it on its device
            self._tell_compiled(queries, known if valid is None else valid.shape[-1])
            return self._stock.mask(**arguments)
        if queries == 1:
            return self._stock.mask(**arguments)
        tokens = int(arguments.get("q_offset", 0)) + queries
        reason = "" if tokens < self._min_tokens else why_not_mask(arguments)
        if reason is None:
            try:
                self._forward.prefill = prefill = self._begin(arguments, tokens)
                return prefill.marker
            except Unserved as unserved:
                reason = str(unserved)
        self._forward.verdict = self._forward.verdict or reason
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
        """Attention of one layer.

        Args:
            query, key, value: `[B, Hq, Nq, D]` and twice `[B, Hkv, Nk, D]`.
            attention_mask: the result of `mask`, or a mask that the caller made.

        Returns:
            `[B, Nq, Hq, D]`, and the weights if the attention of before gave some.
        """
        call = LayerCall(module, query, key, value, arguments)
        if torch.compiler.is_compiling():
            return call.dense(self._stock, self._compiled_mask(query, key, attention_mask))
        if attention_mask is None or attention_mask.dim() != 2:
            verdict = self._forward.verdict
            if query.shape[2] > 1 and key.shape[2] >= self._min_tokens and verdict != "":
                self._count_call()
                self._fallbacks.tell(self._why_not(call) or verdict or NOT_OURS)
            return call.dense(self._stock, attention_mask)
        prefill = self._forward.prefill = self._of(attention_mask, query, key)
        out = self._marked(call, prefill)
        return call.dense(self._stock, prefill.stock_mask) if out is None else (out, None)

    def _marked(self, call: LayerCall, prefill: Prefill) -> torch.Tensor | None:
        """A layer of a forward that may be sparse; None if the layer is dense."""
        reason, parts = self._why_not(call), tuple[Part, ...]()
        if reason is None:
            try:
                parts = prefill.parts(self._vision.spans)
            except Unserved as unserved:
                reason = str(unserved)
        if reason is None and not any(part.is_sparse for part in parts):  # text alone
            return None
        self._count_call()
        layer = getattr(call.module, "layer_idx", 0)
        is_known = layer in range(len(self._specs))
        spec = self._specs[layer] if is_known else None
        if reason is None and not is_known:
            reason = f"a layer (layer_idx={layer}) that is not among those of the configuration"
        if reason is None and spec is not None:
            reason = self._why_no_kernel(call, prefill, parts, spec)
        if reason is not None:
            self._fallbacks.tell(reason)
        return None if reason is not None or spec is None else self._sparse(call, prefill, parts, spec, layer)

    def _count_call(self) -> None:
        with self._lock:
            self.calls += 1

    def _begin(self, arguments: dict[str, Any], tokens: int) -> Prefill:
        valid = arguments.get("attention_mask")
        if valid is None:
            valid = torch.ones(arguments["batch_size"], tokens, dtype=torch.bool, device=arguments["device"])
        elif valid.shape[1] < tokens:
            raise Unserved("a padding mask that is shorter than the tokens")
        marker = valid[:, :tokens].bool()
        # A static cache counts its tokens in place: when a layer asks for the mask, it holds those of this forward too.
        arguments = arguments | {"q_offset": tokens - arguments["q_length"]}
        return Prefill(marker, arguments["q_length"], lambda: self._stock.mask(**arguments), self._dense_last)

    def _of(self, marker: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Prefill:
        """The forward that a marker belongs to: the one that runs, or one whose mask was made some time ago."""
        made = self._forward.prefill
        if made is not None and made.is_marked_by(marker) and made.queries == query.shape[2]:
            return made
        return Prefill(marker, query.shape[2], lambda: self._stock_mask(marker, query, key), self._dense_last)

    def _stock_mask(self, marker: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """The mask that a model would have had instead of a marker."""
        return self._stock.mask(
            batch_size=query.shape[0],
            q_length=query.shape[2],
            kv_length=key.shape[2],
            q_offset=marker.shape[1] - query.shape[2],
            attention_mask=marker,
            device=query.device,
            dtype=query.dtype,
        )

    def _compiled_mask(
        self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask of a compiled layer. It has a marker where the layers are compiled and the model is not."""
        queries = query.shape[2]
        if attention_mask is None or attention_mask.dim() != 2:
            self._tell_compiled(queries, queries)  # of the keys, some may be room for more
            return attention_mask
        self._tell_compiled(queries, attention_mask.shape[1])
        return self._stock_mask(attention_mask, query, key)

    def _tell_compiled(self, queries: int, tokens: int) -> None:
        if self.may_be_sparse(queries, tokens):
            self._fallbacks.tell_traced(COMPILED)

    def _why_not(self, call: LayerCall) -> str | None:
        reason = call.why_not(self._float32_on_gpu) if call.is_causal else "attention that is not causal"
        if reason is None and call.module not in self._layers:
            return NOT_ITS_LAYER
        if reason is None and self._vision.wants_weights:
            return TOLD["output_attentions"]
        if reason is None and self._forward.wants_gradient and not torch.is_grad_enabled() and call.module.training:
            return CHECKPOINTED
        return "a quantised cache" if reason is None and is_quantised(self._vision.cache) else reason

    def _why_no_kernel(
        self, call: LayerCall, prefill: Prefill, parts: Sequence[Part], spec: AttentionSpec
    ) -> str | None:
        """Why the device would compute the call with the reference, which is slow there."""
        if call.query.device.type == "cpu":
            return None
        alike = (spec, call.computed[0].dtype, call.query.device, call.query.shape, call.key.shape)
        if alike not in prefill.kernels:
            calls = (
                make_call(
                    *call.rows(prefill, part),
                    spec,
                    text_before=part.text_before,
                    text_after=part.text_after,
                    scale=call.scale,
                    causal=True,
                )
                for part in parts
            )
            prefill.kernels[alike] = next((why for why in map(why_no_kernel, calls) if why is not None), None)
        return prefill.kernels[alike]

    def _sparse(
        self, call: LayerCall, prefill: Prefill, parts: Sequence[Part], spec: AttentionSpec, layer: int
    ) -> torch.Tensor:
        batch, heads, queries, head_dim = call.query.shape
        out, stats = None, []
        for part in parts:
            rows = call.rows(prefill, part)
            found, figures = psa_attention(
                *rows,
                spec,
                text_before=part.text_before,
                text_after=part.text_after,
                scale=call.scale,
                causal=True,
                strict=self._fallbacks.strict,
                return_stats=True,
            )
            stats += [figures] if part.is_sparse else []
            if found.shape[:2] == (batch, queries):  # all there is
                out = found
                break
            if out is None:  # rows of padding stay zero; no other row reads them
                out = found.new_zeros(batch, queries, heads, head_dim)
            first = max(part.first_key - prefill.first_query, 0)
            out[part.items, first : first + found.shape[1]] = found
        assert out is not None  # a part is sparse
        self.counter.note(layer, stats)
        with self._lock:
            self.prefills += not prefill.is_counted
        prefill.is_counted = True
        return out
