"""Where text and video tokens stand in the queries and keys of one call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class TokenLayout:
    """Text tokens before the video tokens, the video tokens, text tokens after them; queries and keys alike.

    Attributes:
        text_before, text_after: numbers of text tokens.
        video_queries, video_keys: numbers of video tokens among the queries and among the keys.
        permutation: None, or int64 `[video]`: entry i names the video token that stands at position i of the order in
            which blocks are formed. It applies to queries and keys, so their video tokens must be equally many.
    """

    text_before: int
    text_after: int
    video_queries: int
    video_keys: int
    permutation: torch.Tensor | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Text tokens before the video keys, video keys, text tokens after them."""
        return self.text_before, self.video_keys, self.text_after

    @cached_property
    def short_permutation(self) -> torch.Tensor | None:
        """The permutation in int32, which costs the kernels half the registers; all calls with it share it."""
        return None if self.permutation is None else _in_short(self.permutation)

    def video_query_tokens(self, device: torch.device) -> torch.Tensor:
        """Index among all queries of each video query, in block order: int64 `[video_queries]`."""
        return self._video_tokens(self.video_queries, device)

    def video_key_tokens(self, device: torch.device) -> torch.Tensor:
        """Index among all keys of each video key, in block order: int64 `[video_keys]`."""
        return self._video_tokens(self.video_keys, device)

    def text_query_tokens(self, device: torch.device) -> torch.Tensor:
        """Index among all queries of each text query: int64 `[text_before + text_after]`."""
        return self._text_tokens(self.video_queries, device)

    def text_key_tokens(self, device: torch.device) -> torch.Tensor:
        """Index among all keys of each text key: int64 `[text_before + text_after]`."""
        return self._text_tokens(self.video_keys, device)

    def _video_tokens(self, video: int, device: torch.device) -> torch.Tensor:
        if self.permutation is not None:
            return self.permutation + self.text_before
        return torch.arange(self.text_before, self.text_before + video, device=device)

    def _text_tokens(self, video: int, device: torch.device) -> torch.Tensor:
        tokens = torch.arange(self.text_before + self.text_after, device=device)
        return torch.where(tokens < self.text_before, tokens, tokens + video)


# The last few, while the permutations live; with a count of the writes to each.
_short: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _in_short(permutation: torch.Tensor) -> torch.Tensor:
    version, short = _short.get(permutation, (None, None))
    # Those made in inference mode count no writes.
    if version is None or permutation.is_inference() or version != permutation._version:
        short = permutation.to(torch.int32)
        if not permutation.is_inference():
            _short[permutation] = permutation._version, short
    return short


def make_layout(
    query_tokens: int, key_tokens: int, text_before: int, text_after: int, permutation: torch.Tensor | None
) -> TokenLayout:
    """Check the token counts of a call and describe its layout.

    Raises:
        ValueError: the text tokens do not fit, or the permutation is not one of the video tokens.
        TypeError: the permutation is no tensor.
    """
    for name, count in (("text_before", text_before), ("text_after", text_after)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name}={count!r}: expected a number of tokens, 0 or more")
    text = text_before + text_after
    for name, tokens in (("queries", query_tokens), ("keys", key_tokens)):
        if tokens < text:
            raise ValueError(
                f"{tokens} {name} cannot hold text_before={text_before} and text_after={text_after} tokens"
            )
    layout = TokenLayout(text_before, text_after, query_tokens - text, key_tokens - text, permutation)
    if permutation is not None:
        _check_permutation(layout, permutation)
    return layout


def _check_permutation(layout: TokenLayout, permutation: torch.Tensor) -> None:
    if not isinstance(permutation, torch.Tensor):
        raise TypeError(f"permutation: expected a tensor or None, got {type(permutation).__name__}")
    if layout.video_queries != layout.video_keys:
        raise ValueError(
            "permutation: needs as many video queries as video keys, "
            f"got {layout.video_queries} and {layout.video_keys}"
        )
    if permutation.dtype != torch.int64 or permutation.shape != (layout.video_keys,):
        raise ValueError(
            f"permutation: expected int64 of shape ({layout.video_keys},), "
            f"got {permutation.dtype} of shape {tuple(permutation.shape)}"
        )
    # On a GPU the check would wait for the device; there an index out of range fails in the gather itself.
    if permutation.device.type == "cpu":
        seen = torch.zeros(layout.video_keys, dtype=torch.bool)
        inside = (permutation >= 0) & (permutation < layout.video_keys)
        seen[permutation[inside]] = True
        if not bool(seen.all()):
            raise ValueError(f"permutation: expected every index from 0 to {layout.video_keys - 1} exactly once")
