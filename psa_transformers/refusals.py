"""What PSA does not serve, and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import cache_utils
from transformers.masking_utils import causal_mask_function

NOT_OURS = "a mask that did not come from the mask functions of transformers"

# Arguments that say nothing about what is attended.
HARMLESS = frozenset(
    (
        "cache_position",
        "deterministic",
        "is_causal",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "use_cache",
    )
)
# In this order: the first that a call has is the one that is told.
TOLD = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap on the logits",
    "s_aux": "attention sinks that are learned (s_aux)",
    "position_bias": "a position bias",
    "output_attentions": "output_attentions asks for the attention weights",
    "cache": "continuous batching (a paged cache)",
    "block_table": "continuous batching (a paged cache)",
    "read_index": "continuous batching (a paged cache)",
    "write_index": "continuous batching (a paged cache)",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "seq_idx": "packed sequences",
}


def why_not_mask(arguments: Mapping[str, Any]) -> str | None:
    """Why a mask that a model asks for is not that of plain causal attention; None if it is."""
    if arguments.get("local_size") is not None:
        return "a sliding window or chunks"
    if arguments["mask_function"] is not causal_mask_function:
        return "a mask that is more than causal: packed sequences, or tokens that attend both ways"
    if arguments.get("kv_offset", 0) != 0:
        return "a cache that no longer holds the first tokens"
    if not arguments.get("allow_is_causal_skip", True):
        return "a mask that the model computes with"
    return None


def why_not_arguments(arguments: Mapping[str, Any]) -> str | None:
    """Why a call of an attention function is more than attention, by its first argument that says so."""
    if arguments.get("dropout"):
        return "dropout, as in training"
    for name, reason in TOLD.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            return reason
    unknown = sorted(name for name in arguments if name not in HARMLESS and name not in TOLD and name != "dropout")
    return next((f"an argument that is not known: {name}" for name in unknown if arguments[name] is not None), None)


def why_not_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why tensors `[B, heads, tokens, head_dim]` of a decoder cannot be served; None if they can."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return "a gradient is asked for; use torch.no_grad()"
    if key.shape != value.shape or query.shape[3] != key.shape[3]:
        return f"keys of head_dim {key.shape[3]} and values of {value.shape[3]}"
    return None


def is_quantised(cache: Any) -> bool:
    """Whether a cache keeps its tokens in fewer bits."""
    kind = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
    return any(isinstance(layer, kind) for layer in getattr(cache, "layers", ()))
