"""Prefills of models that are compiled: a graph can hold no sparse attention, which looks at what it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from psa_transformers.spans import by_name, cache_of, tokens_of

COMPILED = "a compiled forward of many tokens; call the model uncompiled for prefills, as `generate` does"
NAME = "get_compiled_call"


def keep_prefills_uncompiled(model: PreTrainedModel, may_be_sparse: Callable[[int, int], bool]) -> Callable[[], None]:
    """Let `generate` compile its steps of decoding alone.

    With a cache that can be compiled, it asks `get_compiled_call` for what runs its steps, and for what runs the chunks
    of a prefill.

    Args:
        may_be_sparse: whether a forward may be, by the number of its tokens and of those in the cache after it.

    Returns:
        The way back.
    """
    stock, before = model.get_compiled_call, vars(model).get(NAME)

    def get_compiled_call(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        compiled = stock(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = by_name(model, args, kwargs)
            tokens, cache = tokens_of(given), cache_of(given)
            queries = 1 if tokens is None else tokens.shape[1]
            past = 0 if queries == 1 or cache is None else int(cache.get_seq_length())
            return (model if may_be_sparse(queries, past + queries) else compiled)(*args, **kwargs)

        return call

    def undo() -> None:
        if vars(model).get(NAME) is get_compiled_call:  # whoever has set another since then keeps it
            delattr(model, NAME)
            if before is not None:
                setattr(model, NAME, before)

    setattr(model, NAME, get_compiled_call)
    return undo
