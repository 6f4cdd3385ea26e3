"""What to compute: the parameters of Pyramid Sparse Attention, checked once when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

RULES = ("count", "mass", "budget")
RESTS = ("skip", "mean")
ESTIMATORS = ("sampled", "pooled")
STATISTICS = ("max", "mean")
PRECISIONS = ("native", "int8_qk")
ERROR_MODELS = ("tuned", "fitted")


@dataclass(frozen=True)
class Importance:
    """How the importance of a key block for a query block is estimated.

    Each query block is represented by one vector of every `query_stride` neighbouring queries and each key block by one
    of every `key_stride` keys: the first of them (`sampled`) or their mean (`pooled`). The paper's sample counts are
    s_q = block_query / query_stride and s_k = block_key / key_stride. `statistic` reduces the softmax probabilities of
    a pair of blocks to one number. The default strides cost a quarter of the paper's, which are 4 and 4.
    """

    estimator: str = "sampled"
    statistic: str = "max"
    query_stride: int = 8
    key_stride: int = 8

    def __post_init__(self) -> None:
        _require_choice("importance.estimator", self.estimator, ESTIMATORS)
        _require_choice("importance.statistic", self.statistic, STATISTICS)
        _require_positive_int("importance.query_stride", self.query_stride)
        _require_positive_int("importance.key_stride", self.key_stride)


class _Hashed:
    """Holds the hash of a spec, which is asked for several times a call; it is no field."""

    __slots__ = ("_hash",)
    _hash: int


@dataclass(frozen=True)
class AttentionSpec(_Hashed):
    """Parameters of one call of Pyramid Sparse Attention; the default is the paper's PSA-3.

    Attributes:
        block_query: queries per query block.
        block_key: keys per key block.
        levels: pooling factors, finest first; each divides `block_key`.
        rule: how levels are chosen. `count` and `mass` compare thresholds with a share, of the blocks or of the row's
            importance. `budget` chooses the levels with which a row of the given density errs least, by the estimate
            in `allocation/prices.py`.
        thresholds: one per level, non-decreasing in [0, 1]. Let c be the share that the blocks more important than a
            block make up. The block gets the first level h with c < thresholds[h]; past the last threshold `rest`
            decides. The rule `budget` does not use them.
        floor: the most important blocks, up to this share (by count), get the finest level whatever the rule says.
        similarity: None, or one threshold per level after the first. A key block may be pooled up to the last level
            at which the mean cosine of its neighbouring keys is above the threshold.
        importance: how importance is estimated.
        rest: `skip` drops blocks past the last threshold; `mean` keeps one mean token for each of them.
        precision: of the products of queries and keys. `native` is that of the tensors; `int8_qk` is 8-bit integers, as
            `quantise/reference.py` makes them, where a kernel can. Importance and lists are the same with both, and
            values and their weights keep the precision of the tensors.
        density: for the rule `budget` only: the share of the cost of dense attention, above 0 and at most 1.
        error_model: for the rule `budget` only: the constants by which it estimates errors, `tuned` on videos of the
            demo model or `fitted` to measured errors of blocks of three models (`allocation/prices.py`).
        keep_first, keep_last: for causal calls only: of the key blocks before the diagonal of a query block, how many
            of the first and of the last are always exact. The finest level has to be 1.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and what is allowed.
    """

    block_query: int = 128
    block_key: int = 64
    levels: tuple[int, ...] = (1, 2, 4)
    rule: str = "count"
    thresholds: tuple[float, ...] = (0.15, 0.25, 0.45)
    floor: float = 0.0
    similarity: tuple[float, ...] | None = None
    importance: Importance = field(default_factory=Importance)
    rest: str = "skip"
    density: float | None = None
    precision: str = "native"
    error_model: str = "tuned"
    keep_first: int = 0
    keep_last: int = 0

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash(tuple(getattr(self, each.name) for each in fields(self))))
            return self._hash

    @property
    def factors(self) -> tuple[int, ...]:
        """The pooling factor of each level, and last of the blocks past them where their means are attended."""
        return self.levels + ((self.block_key,) if self.rest == "mean" else ())

    def __getstate__(self) -> dict[str, Any]:
        # Leave the hash out: another process hashes strings to other numbers.
        return dict(vars(self))

    def __post_init__(self) -> None:
        # Store lists as tuples, so that a spec can always be hashed.
        for name in ("levels", "thresholds", "similarity"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _require_positive_int("block_query", self.block_query)
        _require_positive_int("block_key", self.block_key)
        _require_choice("rule", self.rule, RULES)
        _require_choice("rest", self.rest, RESTS)
        _require_choice("precision", self.precision, PRECISIONS)
        _require_choice("error_model", self.error_model, ERROR_MODELS)
        self._check_levels()
        _require_share("floor", self.floor)
        if self.rule == "budget":
            self._check_budget()
        else:
            self._check_thresholds()
            self._check_similarity()
        self._check_strides()
        self._check_kept()

    def _check_levels(self) -> None:
        if not isinstance(self.levels, tuple) or not self.levels:
            raise ValueError(f"levels={self.levels!r}: expected at least one pooling factor, such as (1, 2, 4)")
        for level in self.levels:
            _require_positive_int("levels", level)
            if self.block_key % level:
                raise ValueError(f"levels={self.levels!r}: {level} does not divide block_key={self.block_key}")
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels={self.levels!r}: expected strictly increasing pooling factors, finest first")

    def _check_thresholds(self) -> None:
        thresholds = self.thresholds
        if self.density is not None:
            raise ValueError(f"density={self.density!r}: expected None with the rule {self.rule!r}")
        if not isinstance(thresholds, tuple) or len(thresholds) != len(self.levels):
            raise ValueError(f"thresholds={thresholds!r}: expected one per level of levels={self.levels!r}")
        for threshold in thresholds:
            _require_share("thresholds", threshold)
        if list(thresholds) != sorted(thresholds):
            raise ValueError(f"thresholds={thresholds!r}: expected values that do not decrease (they are cumulative)")
        if thresholds[-1] <= 0:
            raise ValueError(f"thresholds={thresholds!r}: the last must be above 0, or no key would be attended")

    def _check_budget(self) -> None:
        if not _is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(f"density={self.density!r}: the rule 'budget' needs a number above 0 and at most 1")
        if self.rest == "mean" and self.density * self.block_key < 1:
            raise ValueError(f"density={self.density!r}: the mean tokens alone are 1 / {self.block_key}; expected more")
        for name, unused in (("floor", 0), ("similarity", None)):
            if getattr(self, name) != unused:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {unused} with the rule 'budget'")

    def _check_similarity(self) -> None:
        if self.similarity is None:
            return
        if not isinstance(self.similarity, tuple) or len(self.similarity) != len(self.levels) - 1:
            raise ValueError(
                f"similarity={self.similarity!r}: expected None or {len(self.levels) - 1} thresholds, "
                f"one per level after the first of levels={self.levels!r}"
            )
        for threshold in self.similarity:
            if not _is_number(threshold) or not -1 <= threshold <= 1:
                raise ValueError(f"similarity={self.similarity!r}: expected cosines between -1 and 1")

    def _check_strides(self) -> None:
        importance = self.importance
        if not isinstance(importance, Importance):
            raise ValueError(f"importance={importance!r}: expected an Importance")
        for name, stride, block in (
            ("query_stride", importance.query_stride, self.block_query),
            ("key_stride", importance.key_stride, self.block_key),
        ):
            if block % stride:
                raise ValueError(f"importance.{name}={stride}: expected a divisor of the block of {block} tokens")

    def _check_kept(self) -> None:
        for name, value in (("keep_first", self.keep_first), ("keep_last", self.keep_last)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}={value!r}: expected a number of blocks, 0 or more")
            if value and self.levels[0] != 1:
                raise ValueError(f"{name}={value!r}: expected 0 where levels={self.levels!r} begin with another than 1")


def _is_number(value: object) -> TypeGuard[float]:
    # Compared, for an integer may be too large to be made a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")


def _require_share(name: str, value: object) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a number between 0 and 1")


def _require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
