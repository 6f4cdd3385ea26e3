"""What the attention of several families has in common, in the layout `[B, N, H, D]`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from psa_diffusers.families.family import AttentionCall, DenseOnlyError

if TYPE_CHECKING:
    import torch

    Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


Found = TypeVar("Found")


def first_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
    """The `attn1` of each of a model's `transformer_blocks`, by name."""
    return {f"transformer_blocks.{index}": block.attn1 for index, block in enumerate(transformer.transformer_blocks)}


def linears(attn: Any, x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], ...]:
    """Functions that give queries, keys and values `[B, N, H * D]`; fused projections run here, at once."""
    if getattr(attn, "fused_projections", False):
        return tuple(partial(_itself, part) for part in attn.to_qkv(x).chunk(3, dim=-1))
    return partial(attn.to_q, x), partial(attn.to_k, x), partial(attn.to_v, x)


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def one_by_one(
    call: AttentionCall,
    queries: Callable[[], torch.Tensor],
    keys: Callable[[], torch.Tensor],
    values: Callable[[], torch.Tensor],
) -> Projections:
    """Queries, keys and values `[B, N, H, D]`; each is computed once `call.ready` was told of the one before it.

    Values come last: compilers fuse what normalises and rotates queries and keys, so that these are there together.
    """
    query = queries()
    call.ready("queries", query)
    key = keys()
    call.ready("keys", key)
    value = values()
    call.ready("values", value)
    return query, key, value


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
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)
    # The same in five kernels instead of eight, as both halves are computed where they belong.
    turned = torch.empty(x.shape, dtype=torch.result_type(x, cos), device=x.device)
    lower, upper = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=lower).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=upper).addcmul_(first, sin)
    return turned.type_as(x)


def project_added(attn: Any, text: torch.Tensor) -> Projections:
    """Queries, keys and values `[B, T, H, D]` of text that has projections and norms of its own."""
    query, key, value = split_heads(attn, attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    return normalise(attn.norm_added_q, query), normalise(attn.norm_added_k, key), value


def join(first: Projections, second: Projections) -> Projections:
    """Queries, keys and values of some tokens with those of others after them."""
    query, key, value = (concatenate(*pair) for pair in zip(first, second, strict=True))
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


def last_grid(coordinates: torch.Tensor) -> tuple[int, int, int]:
    """Frames, height and width of the grid that the last tokens of a sequence form.

    Args:
        coordinates: `[3, N]`: time, row and column of each token.
    """
    import torch

    same_frame = coordinates[0] == coordinates[0, -1]
    same_row = same_frame & (coordinates[1] == coordinates[1, -1])
    size, width = _run_at_end(same_frame), _run_at_end(same_row)
    blocks = coordinates[:, coordinates.shape[1] % size :].unflatten(1, (-1, size)).flip(1)
    # A frame belongs to the grid if it has the same rows and columns as the last one, and comes before the next.
    alike = (blocks[1:] == blocks[1:, :1]).all(0).all(-1)
    one_time = (blocks[0] == blocks[0, :, :1]).all(-1)
    earlier = torch.cat([coordinates.new_ones(1, dtype=torch.bool), blocks[0, 1:, 0] < blocks[0, :-1, 0]])
    frames = int((alike & one_time & earlier).int().cumprod(0).sum())
    return frames, size // width, width


def _run_at_end(values: torch.Tensor) -> int:
    """How many of the last values are true without a gap."""
    return int(values.flip(0).int().cumprod(0).sum())


class ReadOnce(Generic[Found]):
    """A function of tensors, called once for those that all layers of a forward, or all steps of a run, share.

    Tensors count as the same if they are the same objects, nothing has written to them since, and work goes to the same
    stream. Those of inference mode do not tell, and are read every time. Only the last result is kept, as long as its
    tensors live, and no tensor is kept alive.

    Args:
        read: what to find out.
    """

    def __init__(self, read: Callable[..., Found]) -> None:
        self._read = read
        self._last: tuple[list[weakref.ref[torch.Tensor]], list[int], Found] | None = None

    def __call__(self, *tensors: torch.Tensor) -> Found:
        """What `read` finds in the tensors."""
        if any(tensor.is_inference() for tensor in tensors):
            return self._read(*tensors)
        versions = [tensor._version for tensor in tensors] + [_stream(tensor) for tensor in tensors if tensor.is_cuda]
        if self._last is not None:
            known, then, found = self._last
            if then == versions and all(each() is tensor for each, tensor in zip(known, tensors, strict=True)):
                return found
        found = self._read(*tensors)
        self._last = [weakref.ref(tensor, self._forget) for tensor in tensors], versions, found
        return found

    def _forget(self, gone: weakref.ref[torch.Tensor]) -> None:
        if (last := self._last) is not None and any(each is gone for each in last[0]):
            self._last = None


def _stream(tensor: torch.Tensor) -> int:
    import torch

    return torch.cuda.current_stream(tensor.device).cuda_stream
