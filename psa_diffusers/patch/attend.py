"""The attention of a layer, from its queries, keys and values: eagerly, inside a graph, and on several ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch

from psa_diffusers.families import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.patch.dense_calls import QKV, DenseCalls, Parts
from psa_diffusers.patch.dense_reasons import Fallbacks
from psa_diffusers.patch.finite_guard import COMPUTED_AGAIN, FULL_COMPUTED_AGAIN, FiniteGuard, all_finite
from psa_diffusers.patch.full_attention import FullAttention
from psa_diffusers.patch.list_cache import own_copy
from psa_diffusers.patch.masks import ListRecorder
from psa_diffusers.patch.parallel.exchange import Exchange
from psa_diffusers.patch.parallel.exchanges import Exchanges
from psa_diffusers.patch.parallel.share import Ulysses
from psa_diffusers.patch.run import NO_GRID, Forward, Route
from psa_diffusers.patch.served_calls import ServedCalls
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.stated_step import COMPUTED, NOT_WARM, WarmCalls, hold
from psa_diffusers.patch.text_padding import attend_real_text
from psa_diffusers.patch.token_order import Grid, permutation_on
from psa_kernels import AttentionStats

Compute = Callable[["TokenAttention", Layer, Forward, QKV, AttentionCall], tuple[Parts, list[AttentionStats]]]


class TokenAttention:
    """Computes the attention of one family, after the projections.

    Tensors are `[B, N, H, D]`, with the text tokens where the family has them. Results come in two parts: all tokens
    before the text that stands last, and that text. With `strict` it is an error if a GPU cannot use its fastest
    kernel.

    Attributes:
        guard: records values that are not finite.
        dense: computes dense attention that is not left to the module's own processor.
        full: computes dense layers by the operator, where the preset asks for that.
        compute: None, or a function that replaces `sparse`, such as one that measures it. It gets this object; if it
            returns no statistics, the call counts as dense.
        mask_recorder: gets the block lists of sparse calls, as `MaskRecorder.record` does.
    """

    def __init__(self, family: type[ModelFamily], fallbacks: Fallbacks, strict: bool = False) -> None:
        self._family, self._fallbacks, self._strict = family, fallbacks, strict
        self.guard = FiniteGuard(fallbacks, strict)
        self.dense = DenseCalls(family)
        self.full = FullAttention(fallbacks)
        self._served = ServedCalls(fallbacks.remark)
        self._exchanges = Exchanges(fallbacks.remark)
        self.compute: Compute | None = None
        self.mask_recorder: ListRecorder | None = None
        self._warm = WarmCalls()

    def decide(self, forward: Forward, layer: Layer, call: AttentionCall) -> Route:
        """Decide whether a call is sparse: by the layer's route, unless the call's tensors rule it out."""
        route = forward.routes[layer.name]
        if route.full:
            return route if self._can_be_full(layer, call) else Route(False)
        if not route.sparse and not route.corrects:
            return route
        if (obstacle := self._why_not_sparse(forward, layer, call)) is None:
            return route
        # A layer that the preset keeps dense needs no reason.
        return Route(False, obstacle if route.sparse else None)

    def _why_not_sparse(self, forward: Forward, layer: Layer, call: AttentionCall) -> str | None:
        forward = self._with_all_videos(forward, call)
        tokens, video = call.hidden_states.shape[1], forward.video_tokens
        if tokens < video or (tokens > video and not (self._family.history or self._family.appended)):
            grid = " x ".join(map(str, forward.grid))
            return f"the sequence has {tokens} tokens, but the video's grid is {grid}"
        if (refused := self._served.earlier(layer, call)) is not None and self.compute is None:
            return refused
        try:
            self.dense.real_text(call)
            return None
        except DenseOnlyError as error:
            return str(error)

    def _can_be_full(self, layer: Layer, call: AttentionCall) -> bool:
        if self.full.was_refused(layer, call):
            return False
        try:
            self.dense.real_text(call)
            return True
        except DenseOnlyError:
            return False

    def settle(self, forward: Forward, layer: Layer, route: Route, call: AttentionCall, qkv: QKV) -> Route:
        """Confirm what `decide` said, now that the queries, keys and values are there: a kernel has to serve them.

        Raises:
            RuntimeError: the forward is being captured into a CUDA graph, and this sparse call cannot be.
        """
        if forward.captured and route.sparse:
            if self.compute is not None:
                raise RuntimeError(COMPUTED)
            self._warm.check(layer, qkv[0])
        if route.full and not self.full.serves(layer, call, qkv):
            return Route(False)
        if route.sparse or route.corrects:
            video, by_kernel = self._with_all_videos(forward, call).video_tokens, self.compute is None
            if (reason := self._served.why_not(layer, call, qkv, video, by_kernel)) is not None:
                return Route(False, reason if route.sparse else None)
        return route

    def tell(self, what: str) -> None:
        """As `Fallbacks.tell`."""
        self._fallbacks.tell(what)

    def note_dense(self, forward: Forward, layer: Layer, reason: str | None) -> None:
        """Note a dense call of a layer; `reason` is None, or why it is dense although the preset wants it sparse."""
        forward.note(layer, None, reason)
        if reason is not None:
            self._fallbacks.warn_or_raise(reason)

    def exchange(self, share: Ulysses, text: int, device: torch.device) -> Exchange:
        """What brings the tensors of a call with so many text tokens to the ranks that share its forward."""
        # Text stands before the video or after it.
        before, after = (text, 0) if self._family.text == "before" else (0, text)
        return self._exchanges.of_call(share, before, after, device)

    def attend(
        self,
        forward: Forward,
        layer: Layer,
        qkv: QKV,
        mask: torch.Tensor | None,
        text: int,
        exchange: Exchange | None = None,
    ) -> Parts:
        """The attention of one call, sparse or dense, on all ranks that share the forward.

        Args:
            mask: the attention mask as the model made it.
            text: number of text tokens, padding included.
            exchange: what has begun to exchange `qkv`, where ranks share the forward.
        """
        if forward.share is not None:
            exchange = exchange or self.exchange(forward.share, text, qkv[0].device)
            qkv = exchange.finish(qkv)
        # Only the number of tokens of the block's hidden states matters, so the queries can stand in for them.
        call = AttentionCall(qkv[0][:, text:], qkv[0][:, :text] if text else None, mask)
        route = self.settle(forward, layer, self.decide(forward, layer, call), call, qkv)
        # Only sparse attention by the operator begins without the values.
        if exchange is not None and (not route.sparse or self.compute is not None):
            exchange.await_values()
        if route.ours:
            head, tail = self.ours(forward, layer, qkv, call, route, exchange)
        else:
            self.note_dense(forward, layer, route.reason)
            head, tail = self.dense(qkv, call)
        return (head, tail) if exchange is None else exchange.give_back(head, tail)

    def _with_all_videos(self, forward: Forward, call: AttentionCall) -> Forward:
        """The forward as a layer sees it that attends several videos of the forward's grid."""
        if not self._family.several_videos or forward.grid == NO_GRID:
            return forward
        return replace(forward, videos=max(1, call.hidden_states.shape[1] // math.prod(forward.grid)))

    def ours(
        self,
        forward: Forward,
        layer: Layer,
        qkv: QKV,
        call: AttentionCall,
        route: Route,
        exchange: Exchange | None = None,
    ) -> Parts:
        """Attention by the operator, for a call that `settle` routes there, on one rank.

        With an exchange, whose values may still be on their way to `sparse`, the output may be where other ranks read
        it. If the output is checked and not finite, PyTorch's dense attention replaces it.
        """
        forward = self._with_all_videos(forward, call)
        stats: list[AttentionStats] = []
        if route.corrects:
            forward.note(layer, None)
            return self._dense_and_corrected(layer, forward, qkv, call)
        if route.full:
            after = call.text_tokens if self._family.text == "after" else 0
            parts = self.full.attend(forward.run, qkv, after, self.dense.real_text(call))
        elif self.compute is None:
            parts, stats = self.sparse(layer, forward, qkv, call, exchange)
        else:
            parts, stats = self.compute(self, layer, forward, qkv, call)
        if not forward.watch or forward.run.model_not_finite or all_finite(*parts):
            for figures in stats:
                forward.note(layer, figures)
            if not stats:
                forward.note(layer, None, full_by=self.full.implementation if route.full else None)
            return parts
        forward.run.lists.forget_step(forward.step)
        parts, reason = self.dense(qkv, call), FULL_COMPUTED_AGAIN if route.full else COMPUTED_AGAIN
        forward.note(layer, None, reason)
        if all_finite(*parts):
            self.guard.record_not_finite(forward, layer.name, reason)
        else:
            self.guard.report_model_not_finite(forward, f"the attention of {layer.name}")
        return parts

    def sparse(
        self, layer: Layer, forward: Forward, qkv: QKV, call: AttentionCall, exchange: Exchange | None = None
    ) -> tuple[Parts, list[AttentionStats]]:
        """Sparse attention of a call, with the correction if there is one; and its statistics."""
        corrections, lasting = forward.run.corrections, not forward.captured and not forward.run.lists.one_step_only
        corrected = lasting and corrections.has(layer, forward.moment)
        (head, tail), stats = self._without_correction(layer, forward, qkv, call, corrected, exchange)
        if corrected:
            first = self._first_video(forward, qkv, call)

            def dense_rows(tokens: torch.Tensor) -> torch.Tensor:
                return self.dense.rows(qkv[0][:, first + tokens], qkv, call)

            video = self.video_of(head, forward.attended_grid)
            fits, steps = _fits(forward, video), forward.run.steps
            corrections.add(layer, forward.moment, fits, video, dense_rows, steps)
        return (head, tail), stats

    def _dense_and_corrected(self, layer: Layer, forward: Forward, qkv: QKV, call: AttentionCall) -> Parts:
        """Dense attention of a call. Keeps what sparse attention would leave out, for later steps."""
        parts = self.dense(qkv, call)
        grid, moment, corrections = forward.attended_grid, forward.moment, forward.run.corrections
        dense = self.video_of(parts[0], grid)
        layers = sum(route.corrects for route in forward.routes.values())
        if not forward.run.lists.one_step_only and corrections.has_room(moment, dense, layers, self._fallbacks):
            (head, _), _ = self._without_correction(layer, forward, qkv, call, corrected=True)
            corrections.keep(layer, moment, _fits(forward, dense), dense, self.video_of(head, grid))
        return parts

    def _first_video(self, forward: Forward, qkv: QKV, call: AttentionCall) -> int:
        """Place of the first video token."""
        if self._family.appended:
            return 0
        after = call.text_tokens if self._family.text == "after" else 0
        return qkv[0].shape[1] - forward.video_tokens - after

    def _without_correction(
        self,
        layer: Layer,
        forward: Forward,
        qkv: QKV,
        call: AttentionCall,
        corrected: bool,
        exchange: Exchange | None = None,
    ) -> tuple[Parts, list[AttentionStats]]:
        """Sparse attention of a call, whose output something corrects or not; and its statistics."""
        spec = layer.spec
        # A graph captured at a stated step has no correction and reads the lists of calls before it, so all are alike.
        if layer.uncorrected is not None and (forward.stated or not corrected):
            spec = layer.uncorrected
        assert spec is not None, "a layer without a spec is never routed here"
        query, shape, grid, lists, kept = qkv[0], qkv[0].shape, forward.attended_grid, forward.run.lists, None
        after = call.text_tokens if self._family.text == "after" else 0
        beside = shape[1] - forward.video_tokens - after
        behind = beside if self._family.appended else 0
        moment = forward.moment
        fits: Hashable = None
        if layer.keeps_lists:
            # Rules for steps may change what the layer chooses, or its blocks, from one step to the next.
            fits = (shape[0], shape[2:], query.device, grid, spec, layer.order)
            kept = lists.find(layer.name, moment, fits, layer.preset, forward.stated)
        permutation = permutation_on(layer.order, grid, query.device)
        text = beside - behind, after + behind
        heads_done = None
        # Video travels early if neither a correction nor dense attention changes it afterwards, and if no row of it is
        # text to the operator, which computes text last.
        if exchange is not None and not corrected and not forward.watch and exchange.text == text:
            heads_done = exchange.heads_done
        by_hand = forward.captured and forward.stated
        records = self.mask_recorder is not None and not by_hand and forward.routes[layer.name].sparse
        head, tail, stats, used = attend_real_text(
            *qkv, spec, kept,
            before=text[0],
            after=text[1],
            lengths=self.dense.real_text(call) if after else None,
            permutation=permutation,
            strict=self._strict,
            return_lists=layer.keeps_lists or records,
            await_values=None if exchange is None else exchange.await_values,
            out=None if exchange is None else exchange.output(),
            heads_done=heads_done,
        )  # fmt: skip
        if forward.stated and kept is not None and not forward.captured:
            # Later steps write other lists into the same tensors.
            stats = [replace(figures, listed=figures.listed.clone()) for figures in stats]
        if layer.keeps_lists and kept is None and used is not None:
            kept = lists.rewrite(layer.name, moment, fits, layer.preset, used) if forward.stated else None
            if kept is None and forward.captured:
                raise RuntimeError(NOT_WARM.format(layer=layer.name))
            if kept is None:
                lists.keep(layer.name, moment, fits, layer.preset, own_copy(used) if forward.stated else used)
        if forward.captured:
            assert forward.transformer is not None, "a captured forward knows its transformer"
            hold(forward.transformer, permutation, *(() if kept is None else (kept.ids, kept.counts)))
        else:
            self._warm.add(layer, query)
        if records and self.mask_recorder is not None and used is not None:
            self.mask_recorder.record(layer, forward, used)
        if behind:  # no text, though it was computed as text is
            head, tail = torch.cat([head, tail], dim=1), tail[:, :0]
        return (head, tail), stats

    def video_of(self, head: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The video tokens among those before text that stands last."""
        video, tokens = math.prod(grid), head.shape[1]
        if video == tokens:
            return head
        return head[:, :video] if self._family.appended else head[:, tokens - video :]


def _fits(forward: Forward, video: torch.Tensor) -> Hashable:
    """What must be equal at two steps, for the correction of one to serve the other."""
    return video.shape, video.device, forward.attended_grid
