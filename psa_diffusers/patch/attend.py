"""Attention of a layer's queries, keys and values, video and text, whichever processor, graph or rank they come from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from psa_diffusers.families import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.patch.dense_reasons import Fallbacks, call_reason
from psa_diffusers.patch.finite_guard import REASON, FiniteGuard, all_finite
from psa_diffusers.patch.list_cache import Place, keeps_lists
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.run import Forward, Route
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.text_padding import TextLengths, attend_real_text
from psa_diffusers.patch.token_order import permutation_on
from psa_kernels import AttentionStats

Result = tuple[torch.Tensor, torch.Tensor, list[AttentionStats]]
Compute = Callable[[Layer, Forward, torch.Tensor, torch.Tensor, torch.Tensor, AttentionCall], Result]


class TokenAttention:
    """Attention after the projections of one family.

    Tensors are `[B, N, H, D]` with text where the family has it; results are in two parts: text that stands last, and
    the tokens before it. With `strict` a GPU that cannot use its fastest kernel is an error.

    Attributes:
        compute: what computes a layer that is to be sparse in place of `sparse`, such as what measures it. A call without
            statistics counts as a dense one.
        mask_recorder: is given the block lists of sparse calls.
    """

    def __init__(self, family: type[ModelFamily], fallbacks: Fallbacks, strict: bool = False) -> None:
        self._family, self._fallbacks, self._strict = family, fallbacks, strict
        self._guard = FiniteGuard(fallbacks, strict)
        self._text_lengths = TextLengths()
        self.compute: Compute | None = None
        self.mask_recorder: MaskRecorder | None = None

    def decide(self, forward: Forward, layer: Layer, call: AttentionCall) -> Route:
        """Whether a call is sparse: the layer's route, unless the call's tensors say otherwise."""
        route = forward.routes[layer.name]
        if not route.sparse:
            return route
        reason = call_reason(self._family, forward.grid, call)
        if reason is None:
            try:
                self._real_text(call)
                return route
            except DenseOnlyError as error:
                reason = str(error)
        return Route(False, reason)

    def note_dense(self, forward: Forward, layer: Layer, reason: str | None) -> None:
        """Note a dense call of a layer, and why it is dense if the preset wants it sparse."""
        forward.note(layer, None, reason)
        if reason is not None:
            self._fallbacks.warn_or_raise(reason)

    def attend(
        self,
        forward: Forward,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        text: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of one call, sparse or dense, on all ranks that share the forward.

        Args:
            mask: the attention mask as the model made it.
            text: number of text tokens, padding included.
        """
        share = forward.share
        before, after = (text, 0) if self._family.text == "before" else (0, text)
        if share is not None:
            q, k, v = share.gather_tokens((q, k, v), before, after)
        # Of the hidden states that the block had, only the number of tokens matters.
        call = AttentionCall(q[:, text:], q[:, :text] if text else None, mask)
        route = self.decide(forward, layer, call)
        if not route.sparse:
            self.note_dense(forward, layer, route.reason)
            head, tail = self.dense(q, k, v, call)
        else:
            head, tail, stats = (self.compute or self.sparse)(layer, forward, q, k, v, call)
            if forward.watch and not forward.run.model_not_finite and not all_finite(head, tail):
                head, tail = self._dense_again(forward, layer, q, k, v, call)
            else:
                for figures in stats or [None]:
                    forward.note(layer, figures)
        return (head, tail) if share is None else share.gather_heads(head, tail, before)

    def _dense_again(
        self,
        forward: Forward,
        layer: Layer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention in place of sparse attention that was not finite."""
        forward.run.lists.forget_step(forward.step)
        head, tail = self.dense(q, k, v, call)
        forward.note(layer, None, REASON)
        if all_finite(head, tail):
            self._guard.blame_sparse(forward, layer.name)
        else:
            self._guard.blame_model(forward, f"the attention of {layer.name}")
        return head, tail

    def sparse(
        self,
        layer: Layer,
        forward: Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: AttentionCall,
    ) -> Result:
        """Sparse attention of a call that `decide` lets be so, and its statistics."""
        preset, grid, kept = layer.preset, forward.grid, None
        after = call.text_tokens if self._family.text == "after" else 0
        keeps = keeps_lists(preset)
        if keeps:
            place = Place(forward.step, forward.window, forward.branch)
            fits = (q.shape[0], q.shape[2:], q.device, grid)
            kept = forward.run.lists.find(layer.name, place, fits, preset)
        head, tail, stats, lists = attend_real_text(
            q, k, v, layer.spec, kept,
            before=q.shape[1] - math.prod(grid) - after,
            after=after,
            lengths=self._real_text(call) if after else None,
            permutation=permutation_on(layer.order, grid, q.device),
            strict=self._strict,
            return_lists=keeps or self.mask_recorder is not None,
        )  # fmt: skip
        if keeps and kept is None:
            forward.run.lists.keep(layer.name, place, fits, preset, lists)
        if self.mask_recorder is not None:
            self.mask_recorder.record(layer, forward, lists)
        return head, tail, stats

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of a call, with its mask, or better without: padding that all samples have is cut off."""
        after = call.text_tokens if self._family.text == "after" else 0
        first = q.shape[1] - after
        padding, mask = self._common_padding(call), None
        if padding is None:
            padding, mask = 0, self._dense_mask(call)
        heads_first = (x[:, : x.shape[1] - padding].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        # Results of an operator behind a graph may share no memory.
        return out[:, :first], F.pad(out[:, first:], (0, 0, 0, 0, 0, padding)) if after else out[:, :0].clone()

    def _common_padding(self, call: AttentionCall) -> int | None:
        """How many text tokens are padding in every sample alike; None if samples differ, or another mask is there."""
        try:
            lengths = set(self._real_text(call))
        except DenseOnlyError:
            return None
        return call.text_tokens - lengths.pop() if len(lengths) == 1 else None

    def _real_text(self, call: AttentionCall) -> list[int]:
        """How many text tokens of each sample are no padding."""
        mask = self._family.text_mask(call)
        if mask is None:
            return [call.text_tokens] * len(call.hidden_states)
        return self._text_lengths.of(call.attention_mask, mask)

    def _dense_mask(self, call: AttentionCall) -> torch.Tensor | None:
        """The call's mask as `scaled_dot_product_attention` takes it."""
        try:
            text_mask = self._family.text_mask(call)
        except DenseOnlyError:
            return call.attention_mask
        if text_mask is None:
            return None
        return F.pad(text_mask.bool(), (call.hidden_states.shape[1], 0), value=True)[:, None, None]
