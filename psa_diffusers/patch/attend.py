"""Attention of a layer's queries, keys and values, video and text, whichever processor or graph they come from."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
import torch.nn.functional as F

from psa_diffusers.families import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.patch.graph_ops import Layer
from psa_diffusers.patch.list_cache import ListCache
from psa_diffusers.patch.masks import MaskRecorder
from psa_diffusers.patch.step import DenoisingStep, Grid
from psa_diffusers.patch.text_padding import TextLengths, attend
from psa_diffusers.patch.token_order import token_permutation
from psa_diffusers.presets import TokenOrder
from psa_kernels import AttentionStats, select_blocks

KEPT_PERMUTATIONS = 4


class TokenAttention:
    """Attention after the projections of one family, with what is kept from call to call.

    Tensors are `[B, N, H, D]` with text where the family has it; results are in two parts: text that stands last, and
    the tokens before it. With `strict` a GPU that cannot use its fastest kernel is an error.
    """

    def __init__(self, family: type[ModelFamily], strict: bool = False) -> None:
        self._family = family
        self._strict = strict
        self._cache = ListCache()
        self._text_lengths = TextLengths()
        self._permutations: dict[Hashable, torch.Tensor] = {}
        self.mask_recorder: MaskRecorder | None = None

    def clear(self) -> None:
        """Drop all kept lists."""
        self._cache.clear()

    def forget_step(self, at: DenoisingStep) -> None:
        """Drop the lists that were made at this step: what they were made from was not finite."""
        self._cache.forget_step(at)

    def obstacle(self, at: DenoisingStep, call: AttentionCall) -> str | None:
        """Why a call cannot be sparse."""
        tokens, video = call.hidden_states.shape[1], math.prod(at.grid)
        if tokens < video or (tokens > video and not self._family.history):
            frames, height, width = at.grid
            return f"the sequence has {tokens} tokens, but the video's grid is {frames} x {height} x {width}"
        try:
            self._real_text(call)
        except DenseOnlyError as error:
            return str(error)
        return None

    def sparse(
        self,
        layer: Layer,
        at: DenoisingStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor, list[AttentionStats]]:
        """Sparse attention of a call without `obstacle`, and its statistics."""
        after = self._text_after(call)
        before = q.shape[1] - math.prod(at.grid) - after
        permutation = self.permutation(layer.order, at.grid, q.device)
        fits = (q.shape[0], q.shape[2:], q.device, at.grid)
        lists = self._cache.find(layer.name, at, fits, layer.preset)
        if lists is None:
            lists = select_blocks(
                q, k, layer.spec, v=v, text_before=before, text_after=after, permutation=permutation,
                strict=self._strict,
            )  # fmt: skip
            self._cache.keep(layer.name, at, fits, layer.preset, lists)
        if self.mask_recorder is not None:
            self.mask_recorder.record(layer, at, lists)
        lengths = self._real_text(call) if after else [0] * len(q)
        return attend(
            q, k, v, layer.spec, lists, before=before, after=after, lengths=lengths, permutation=permutation,
            strict=self._strict,
        )  # fmt: skip

    def dense(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense attention of a call, with its mask, or better without: padding that all samples have is cut off."""
        first, after = q.shape[1] - self._text_after(call), self._text_after(call)
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

    def _text_after(self, call: AttentionCall) -> int:
        return call.text_tokens if self._family.text == "after" else 0

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

    def permutation(self, order: TokenOrder, grid: Grid, device: torch.device) -> torch.Tensor | None:
        """A token order of a grid on a device, None for raster; only the last few are kept."""
        if order.order == "raster":
            return None
        key = (order, grid, device)
        if key not in self._permutations:
            if len(self._permutations) == KEPT_PERMUTATIONS:
                self._permutations.clear()
            self._permutations[key] = token_permutation(order.order, grid, order.tile).to(device)
        return self._permutations[key]
