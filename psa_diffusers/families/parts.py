"""What the attention of several families has in common, in the layout `[B, N, H, D]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psa_diffusers.families.family import AttentionCall, DenseOnlyError

if TYPE_CHECKING:
    import torch

    Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def first_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
    """The `attn1` of each of a model's `transformer_blocks`, by name."""
    return {f"transformer_blocks.{index}": block.attn1 for index, block in enumerate(transformer.transformer_blocks)}


def split_heads(attn: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[B, N, H * D]` to `[B, N, H, D]`, each."""
    return tuple(x.unflatten(-1, (attn.heads, -1)) for x in tensors)


def normalise(norm: torch.nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    """Apply a norm that the model may lack."""
    return x if norm is None else norm(x)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring channels of `[..., C]` by angles whose tables `[..., C / 2]` broadcast; keeps the dtype."""
    import torch

    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of the channels of `[..., C]` against the second half.

    Angles have tables `[..., C / 2]` that broadcast; keeps the dtype.
    """
    import torch

    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


def rotate_tokens(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Rotate `[B, N, H, D]` by a model's tables `[N, D]`, cosines and sines, that hold each angle twice."""
    if tables is None:
        return x
    cos, sin = (table[:, None, ::2] for table in tables)
    return rotate_pairs(x, cos, sin)


def project_added(attn: Any, text: torch.Tensor) -> Projections:
    """Queries, keys and values `[B, T, H, D]` of text that has projections and norms of its own."""
    query, key, value = split_heads(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    return normalise(attn.norm_added_q, query), normalise(attn.norm_added_k, key), value


def join(video: Projections, text: Projections) -> Projections:
    """Queries, keys and values of video tokens with those of text after them."""
    query, key, value = (concatenate(*pair) for pair in zip(video, text, strict=True))
    return query, key, value


def concatenate(*tensors: torch.Tensor) -> torch.Tensor:
    """`[B, N, ...]` of several kinds of tokens, one after the other."""
    import torch

    return torch.cat(tensors, dim=1)


def text_only_mask(call: AttentionCall) -> torch.Tensor | None:
    """The mask of a model that masks text tokens only: `[B, T]`, whatever its dtype.

    Raises:
        DenseOnlyError: the mask has another shape.
    """
    mask = call.attention_mask
    if mask is not None and mask.shape != (len(call.hidden_states), call.text_tokens):
        raise DenseOnlyError(f"its attention mask has the shape {tuple(mask.shape)}, which is not one of text padding")
    return mask


def project_out(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    """Hidden states `[B, N, C]` of the attention output `[B, N, H, D]`."""
    linear, dropout = attn.to_out
    return dropout(linear(attended.flatten(2)))
