"""apply_psa: sparse prefills for a model of transformers, and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from psa_presets import Preset, choose_preset
from psa_transformers.compiled import keep_prefills_uncompiled
from psa_transformers.fallbacks import Fallbacks
from psa_transformers.models import (
    check_comparisons,
    check_implementation,
    check_library,
    decoder_of,
    models_around,
    set_implementation,
    vision_towers,
)
from psa_transformers.names import Implementation, take
from psa_transformers.patch import DecoderAttention
from psa_transformers.running import Running
from psa_transformers.settings import causal_specs, tower_spec
from psa_transformers.spans import VisionTokens
from psa_transformers.stats import PrefillStats, summed_up
from psa_transformers.stock import Stock
from psa_transformers.towers import TowerAttention
from psa_transformers.watching import Watch

HANDLE = "_psa_transformers"  # where a patched decoder keeps its handle


class PSAHandle:
    """A patched model: its statistics, and the way to undo the patch, by a `with` statement or `restore`."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._undo: list[Callable[[], Any]] = []
        self._fallbacks = Fallbacks(strict=False)
        self._decoder: DecoderAttention | None = None
        self._towers: list[TowerAttention] = []

    def stats(self) -> PrefillStats:
        """What was attended since the patch, up to `restore`; waits for the device."""
        assert self._decoder is not None
        decoder, towers = self._decoder, [tower.counter for tower in self._towers]
        return summed_up(decoder.prefills, decoder.calls, decoder.counter, towers, self._fallbacks.counts)

    def restore(self) -> None:
        """Give the model its own attention back, between two forwards of any thread. A second call does nothing."""
        with self._running.between_forwards():
            while self._undo:
                self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def apply_psa(
    model: Any,
    preset: str | os.PathLike[str] | Preset = "psa-auto",
    density: float | None = None,
    min_tokens: int = 8192,
    dense_last: int = 512,
    strict: bool = False,
    vision: bool = False,
) -> PSAHandle:
    """Let a model of transformers read long prompts with Pyramid Sparse Attention.

    Prefills become sparse: whole prompts, chunks (`prefill_chunk_size`) and later turns on a dynamic or static cache,
    also in batches with padding before or after their prompts. The sparse span reaches from the first to the last token
    of all images and videos, with the text between them; its tokens attend each other sparsely. Text before and after
    the span is attended exactly, and text queries after it attend everything exactly. Without images and videos the
    span is all tokens except the last ones. Decoding, one token at a time, is dense, and so is a compiled model.

    Attention goes through `AttentionInterface` and `AttentionMaskInterface`, where functions are registered under names
    of their own; no forward is replaced. What PSA cannot serve runs as before, with a warning that says why: sliding
    windows, soft caps, learned sinks, position biases, masks that are more than causal, dropout, tensors that need a
    gradient, quantised and paged caches, `output_attentions`. A model has one patch: a new one replaces it. Several
    threads may run it at once.

    Only the keys of a preset that describe attention count: rule, levels, thresholds or density, block sizes,
    importance, similarity, `rest`, rules for layers, `float32_on_gpu`. Blocks are cut in the order of the tokens. The
    first key block and the two before the diagonal are exact too. Dense steps, rules for steps, `refresh`,
    `share_guidance`, `correction`, `dense_attention`, `order` and the preset's `min_tokens` concern denoising, and have
    no effect.

    Args:
        model: a vision-language model or a language model, with a decoder of text.
        preset: a name, a path or a Preset.
        density: scale the preset to this density, above 0 and up to 1.
        min_tokens: a forward that leaves fewer tokens in the cache runs as before, without a warning.
        dense_last: at least so many of the last tokens of a forward are treated as text.
        strict: raise `PSAFallbackError` instead of a warning.
        vision: also let vision towers attend sparsely, if one call of their attention (a frame or a window in most
            towers) has `min_tokens` tokens or more.

    Returns:
        The handle, also for a `with` statement, which restores the model at its end.

    Raises:
        PresetError: the preset cannot be found, or cannot be used for causal attention.
        TypeError, ValueError: the model has no such decoder, it looks for names of implementations itself, another one
            that shares its configuration is patched, or an argument is out of range.
        ImportError: transformers is too old.
    """
    for name, value in (("min_tokens", min_tokens), ("dense_last", dense_last)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r}: expected a number of tokens, 0 or more")
    check_library()
    chosen = choose_preset(preset, density)
    decoder = decoder_of(model)
    specs = causal_specs(chosen, decoder.config.num_hidden_layers)
    if hasattr(decoder, HANDLE):
        getattr(decoder, HANDLE).restore()
    around, towers = models_around(model, decoder), vision_towers(model, decoder) if vision else []
    before = [Stock(check_implementation(part)) for part in (decoder, *towers)]
    seen, float32_on_gpu = VisionTokens([part.config for part in around]), chosen.float32_on_gpu == "sparse"

    handle = PSAHandle(Running(around))
    handle._fallbacks = Fallbacks(strict)
    attention = DecoderAttention(
        decoder, before[0], specs, seen, handle._fallbacks, min_tokens, dense_last, float32_on_gpu
    )
    handle._decoder = attention
    try:
        _use(handle, decoder, attention, before[0])
        for tower, stock in zip(towers, before[1:], strict=True):
            sparse = TowerAttention(stock, tower_spec(chosen), handle._fallbacks, min_tokens, float32_on_gpu)
            handle._towers.append(sparse)
            _use(handle, tower, sparse, stock)
    except BaseException:
        handle.restore()
        raise
    for depth, part in enumerate(around):
        watch = Watch(depth, part is decoder, handle._running, seen, attention)
        handle._undo += [hook.remove for hook in watch.put_on(part)]
    handle._undo.append(keep_prefills_uncompiled(model, attention.may_be_sparse))
    setattr(decoder, HANDLE, handle)
    handle._undo.append(lambda: delattr(decoder, HANDLE))
    return handle


def _use(handle: PSAHandle, part: Any, attention: Implementation, stock: Stock) -> None:
    """Let a part of the model use a patch's functions, until the handle restores it."""
    name = take(part, attention, stock)

    def undo() -> None:
        # Whoever has chosen another implementation since then keeps it.
        if part.config._attn_implementation == name.text:
            part.set_attn_implementation(stock.name)
        name.give_back()

    handle._undo.append(undo)
    check_comparisons(part, stock.name, name.text)
    set_implementation(part, name.text)
