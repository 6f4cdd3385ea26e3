"""Finds the vision tokens of a prompt, because an attention function sees neither token types nor the cache."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, PreTrainedModel

from psa_transformers.fallbacks import Unserved
from psa_transformers.running import StaysHere

IMAGE, VIDEO = 1, 2  # of mm_token_type_ids
ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

Span = tuple[int, int]


def vision_ids(configs: Iterable[Any]) -> frozenset[int]:
    """The ids of the tokens that stand for images and videos, by the configurations of a model and its parts."""
    homes = [home for config in configs for home in (config, getattr(config, "vision_config", None))]
    found = (getattr(home, name, None) for home in homes for name in ID_NAMES)
    return frozenset(token for token in found if isinstance(token, int))


def by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a module's forward is given."""
    names = inspect.signature(module.forward).parameters if args else ()
    return dict(zip(names, args, strict=False)) | kwargs


def tokens_of(given: dict[str, Any]) -> torch.Tensor | None:
    """The tokens of a forward: `[B, N]`, or `[B, N, D]` if they are embedded; None if it has none."""
    ids = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache that a forward is given or returns, by its name in newer or older transformers; None without any."""
    return next((given[name] for name in ("cache", "past_key_values") if given.get(name) is not None), None)


class _Given(threading.local):
    """What the forward that a thread runs is given.

    Attributes:
        cache: None if it brings none.
        found: bool `[B, N]`: where vision tokens are; None if nothing tells.
        offset: how many tokens are in the cache.
        wants_weights: whether it is to return the weights of attention.
    """

    cache: Any = None
    found: torch.Tensor | None = None
    offset = 0
    wants_weights = False


class VisionTokens(StaysHere):
    """Forward hooks that keep where vision tokens stand, of the forward that runs and of those before it on its cache.

    Attributes:
        ids: of `vision_ids`.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        """
        Args:
            configs: of the decoder and the models around it.
        """
        self.ids = vision_ids(configs)
        self._sees = bool(self.ids) or any(getattr(config, "vision_config", None) is not None for config in configs)
        self._given = _Given()
        # `[B, 2]` a cache: the first position and the one after the last; where there is none, the first is the larger.
        self._past: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()

    @property
    def cache(self) -> Any:
        """That of the forward that runs, None if it brings none."""
        return self._given.cache

    @property
    def wants_weights(self) -> bool:
        """Whether the forward that runs is to return the weights of attention, by an argument or a configuration."""
        return self._given.wants_weights

    def forget(self) -> None:
        """Between forwards: what was known of the last one is gone, but for where vision tokens are in its cache."""
        self._given.cache, self._given.found = None, None
        self._given.offset, self._given.wants_weights = 0, False

    def before(self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what a model, or a part of it that holds the decoder, is given."""
        given = by_name(module, args, kwargs)
        asked = given.get("output_attentions")
        self._given.wants_weights |= bool(module.config.output_attentions if asked is None else asked)
        ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
        tokens, cache = tokens_of(given), cache_of(given)
        if tokens is None or tokens.shape[1] == 1:
            return
        if isinstance(cache, Cache):  # a paged one holds several sequences
            self._given.cache, self._given.offset = cache, int(cache.get_seq_length())
        if types is not None and types.shape == tokens.shape[:2]:
            self._given.found = (types == IMAGE) | (types == VIDEO)
        elif ids is not None and self.ids:
            self._given.found = torch.isin(ids, torch.tensor(sorted(self.ids), device=ids.device))

    def after(self, output: Any) -> None:
        """After the decoder's forward: keep for its cache where vision tokens stand."""
        found, offset, cache = self._given.found, self._given.offset, self._given.cache
        if cache is None and isinstance(output, Mapping):  # not a tuple
            cache = cache_of(output)
        if not isinstance(cache, Cache) or (found is None and self._given.cache is None):  # one token is text
            return
        past = self._past.pop(cache, None)
        if found is None:  # nobody knows any more
            return
        bounds = _bounds(found) + offset
        if offset == 0:
            self._past[cache] = bounds
        elif past is not None and len(past) == len(bounds):
            self._past[cache] = _joined(past, bounds, offset)

    def spans(self, batch: int, queries: int, first_query: int) -> list[Span | None]:
        """The span of each batch item among all keys: from the first vision token to the last; None without any.

        Raises:
            Unserved: it cannot be known.
        """
        found = self._given.found
        if not self._sees:
            return [None] * batch
        if found is None and not self.ids:
            raise Unserved("no image_token_id or video_token_id in the configuration says which tokens are the video's")
        if found is None or found.shape != (batch, queries):
            raise Unserved("no input_ids and no mm_token_type_ids were given, which say where the video is")
        bounds = _bounds(found) + first_query
        if first_query:
            past = None if self.cache is None else self._past.get(self.cache)
            if past is None or len(past) != batch:
                raise Unserved(
                    "the cache holds tokens that were not seen: it is a copy, of another batch, or older than the patch"
                )
            bounds = _joined(past, bounds, first_query)
        return [(first, end) if first < end else None for first, end in bounds.tolist()]


NOWHERE = 2**40


def _bounds(found: torch.Tensor) -> torch.Tensor:
    """First and one after the last true entry of each row of `[B, N]`: int64 `[B, 2]`."""
    places = torch.arange(found.shape[1], device=found.device)
    first = places.masked_fill(~found, NOWHERE).amin(1)
    end = (places + 1).masked_fill(~found, -NOWHERE).amax(1)
    return torch.stack((first, end), 1)


def _joined(past: torch.Tensor, bounds: torch.Tensor, offset: int) -> torch.Tensor:
    """The bounds of both; of the past what the cache still holds."""
    past = past.to(bounds.device)
    first = past[:, 0].where(past[:, 0] < offset, NOWHERE)
    end = past[:, 1].clamp(max=offset)
    return torch.stack((torch.minimum(first, bounds[:, 0]), torch.maximum(end, bounds[:, 1])), 1)
