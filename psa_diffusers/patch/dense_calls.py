"""Dense attention of calls whose text is padded, where it is not left to the module's own processor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from psa_diffusers.families import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.patch.stated_step import PADDED, is_capturing
from psa_diffusers.patch.text_padding import TextLengths

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Text that stands last, and the tokens before it.
Parts = tuple[torch.Tensor, torch.Tensor]


class DenseCalls:
    """Dense attention of a family's calls by PyTorch, and how much of their text is real.

    Tensors are `[B, N, H, D]`, with the text tokens where the family has them.

    Attributes:
        text_tokens: how many text tokens of each sample are real, if the user stated it; else None.
    """

    def __init__(self, family: type[ModelFamily]) -> None:
        self._family = family
        self._text_lengths = TextLengths()
        self.text_tokens: tuple[int, ...] | None = None

    def __call__(self, qkv: QKV, call: AttentionCall) -> Parts:
        """Dense attention of a call. Where all samples have equally much padding, it is cut off instead of masked."""
        after = call.text_tokens if self._family.text == "after" else 0
        padding = self._common_padding(call)
        q, first = qkv[0], qkv[0].shape[1] - after
        out = self.rows(q[:, : q.shape[1] - (padding or 0)], qkv, call)
        # Results of an operator behind a graph may share no memory.
        return out[:, :first], F.pad(out[:, first:], (0, 0, 0, 0, 0, padding or 0)) if after else out[:, :0].clone()

    def rows(self, q: torch.Tensor, qkv: QKV, call: AttentionCall) -> torch.Tensor:
        """Dense attention of some queries of a call, `[B, n, H, D]`, over all its keys that are no padding."""
        padding = self._common_padding(call)
        mask = self._mask(call) if padding is None else None
        k, v = (x[:, : x.shape[1] - (padding or 0)].transpose(1, 2) for x in qkv[1:])
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)

    def _common_padding(self, call: AttentionCall) -> int | None:
        """How much of the text is padding, at its end, in all samples; None if they differ, or a mask is needed."""
        try:
            lengths = set(self.real_text(call))
        except DenseOnlyError:
            return None
        return call.text_tokens - lengths.pop() if len(lengths) == 1 else None

    def _mask(self, call: AttentionCall) -> torch.Tensor | None:
        """The call's mask as `scaled_dot_product_attention` takes it."""
        try:
            text_mask = self._family.text_mask(call)
        except DenseOnlyError:
            return call.attention_mask
        if text_mask is None:
            return None
        return F.pad(text_mask.bool(), (call.hidden_states.shape[1], 0), value=True)[:, None, None]

    def real_text(self, call: AttentionCall) -> list[int]:
        """How many text tokens of each sample are no padding."""
        source, said = call.attention_mask, self.text_tokens
        samples, tokens = call.hidden_states.shape[:2]
        if source is None:
            return [call.text_tokens] * samples
        kind, captured = (samples, tokens, call.text_tokens), is_capturing()
        if said is None and not captured and (known := self._text_lengths.known(source, kind)) is not None:
            return known
        mask = self._family.text_mask(call)
        if mask is None:
            return [call.text_tokens] * samples
        if said is not None and (len(said) != len(mask) or max(said) > call.text_tokens):
            raise ValueError(
                f"text_tokens={said}: expected {len(mask)} numbers, one a sample, of up to {call.text_tokens} tokens"
            )
        if captured:
            if said is None:
                raise RuntimeError(PADDED)
            return list(said)
        lengths = self._text_lengths.of(source, mask, kind)
        if said is not None and list(said) != lengths:
            raise ValueError(f"text_tokens={said}: the mask says that the real text tokens are {lengths}")
        return lengths
