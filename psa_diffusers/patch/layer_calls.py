"""Calls of a layer's attention module: projections, attention and output, eagerly, on several ranks, and in a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from psa_diffusers.families import AttentionCall, ModelFamily
from psa_diffusers.families.family import unheard
from psa_diffusers.patch import graph_ops
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_calls import QKV
from psa_diffusers.patch.sites import LayerSite
from psa_kernels.devices import is_autocast_enabled

RIVALS = (
    "the transformer has several PSAProcessors, but one serves all layers; set the same one on all of them, as "
    "apply_psa(pipe, ...) does"
)
Ready = Callable[[str, torch.Tensor], None]
Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class LayerCalls:
    """Computes calls of one family's layers as their own processors do, but for the attention.

    Results are those of the module's own processor; None if that has to compute the call.
    """

    def __init__(self, family: type[ModelFamily], attention: TokenAttention) -> None:
        self._family, self._attention = family, attention

    def eager(self, attn: torch.nn.Module, site: LayerSite, args: tuple, kwargs: dict[str, Any]) -> Output | None:
        """Compute a layer's attention. If the module's own processor has to compute it, note that and return None."""
        if not site.patch.attached and site.patch.rivals():
            self._attention.note_dense(site.patch.forward, site.layer, RIVALS if site.may_be_sparse else None)
            return None
        if site.skips_scores:
            return None
        forward, attention = site.patch.forward, self._attention
        layer = forward.at_step(site.layer)
        if forward.share is not None:
            return self._shared(attn, site, args, kwargs)
        route = forward.routes[layer.name]
        if route.ours:
            if (call := self._family.call(site.by_name(args, kwargs))) is None:
                return None
            route = attention.decide(forward, layer, call)
            if route.ours:
                qkv = self._project(attn, call)
                route = attention.settle(forward, layer, route, call, qkv)
                if route.ours:
                    return self._output(attn, call, *attention.ours(forward, layer, qkv, call, route))
        attention.note_dense(forward, layer, route.reason)
        return None

    def _shared(self, attn: torch.nn.Module, site: LayerSite, args: tuple, kwargs: dict[str, Any]) -> Output | None:
        """As `eager`, for ranks that share a forward: all take the same route, which was decided before it."""
        forward = site.patch.forward
        layer = forward.at_step(site.layer)
        if not site.in_graph:
            self._attention.note_dense(forward, layer, forward.routes[layer.name].reason)
            return None
        if (call := self._family.call(site.by_name(args, kwargs))) is None:
            return None
        assert forward.share is not None, "only then is a layer shared"
        exchange = self._attention.exchange(forward.share, call.text_tokens, call.hidden_states.device)
        qkv = self._project(attn, call, exchange.begin)
        head, tail = self._attention.attend(forward, layer, qkv, call.attention_mask, call.text_tokens, exchange)
        return self._output(attn, call, head, tail)

    def in_graph(self, attn: torch.nn.Module, site: LayerSite, args: tuple, kwargs: dict[str, Any]) -> Output | None:
        """As `eager`, inside a graph; there the route was decided before the forward."""
        if site.skips_scores:
            return None
        if not site.in_graph and not site.breaks_graphs:
            graph_ops.note_dense(site.number)
            return None
        call = self._family.call(site.by_name(args, kwargs))
        if call is None:
            return None
        text_last = self._family.text == "after"
        ready = partial(graph_ops.begin_exchange, site.number, call.text_tokens) if site.shared else unheard
        q, k, v = self._project(attn, call, ready)
        head, tail = graph_ops.attend(q, k, v, call.attention_mask, site.number, call.text_tokens, text_last)
        return self._output(attn, call, head, tail)

    def _project(self, attn: torch.nn.Module, call: AttentionCall, ready: Ready = unheard) -> QKV:
        """Queries, keys and values in the dtype in which PyTorch's attention would compute with them.

        Under autocast they may come in several dtypes, and what is cast afterwards is not ready before.
        """
        if not is_autocast_enabled(call.hidden_states.device):
            return self._family.project(attn, call if ready is unheard else call.heard_by(ready))
        q, k, v = self._family.project(attn, call)
        dtype = q.dtype if q.dtype == torch.float64 else torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def _output(self, attn: torch.nn.Module, call: AttentionCall, head: torch.Tensor, tail: torch.Tensor) -> Output:
        text = call.text_tokens
        if self._family.text == "before":
            return self._family.output(attn, call, head[:, text:], head[:, :text])
        return self._family.output(attn, call, head, tail if text else None)
