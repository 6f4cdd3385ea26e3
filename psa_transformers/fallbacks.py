"""Why the model's own attention computes calls that are long enough for PSA; each reason gives one warning."""

from __future__ import annotations

import itertools
import warnings

import torch

_numbers = itertools.count(1)


class PSAFallbackWarning(UserWarning):
    """Attention runs as it did before the patch; the message is one line that says why."""


class PSAFallbackError(RuntimeError):
    """Raised instead of a `PSAFallbackWarning` with `strict=True`."""


class Unserved(Exception):
    """A forward cannot be served; its text is the reason."""


class Fallbacks:
    """Counts reasons, and warns once of each.

    Attributes:
        strict: raise instead.
        counts: how many calls of the attention function each reason concerned; 1 of a reason that a trace tells.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.counts: dict[str, int] = {}
        self._patch = f"patch {next(_numbers)}"  # a text, as graphs may take a number for one that varies

    def tell(self, reason: str) -> None:
        """Note one call.

        Raises:
            PSAFallbackError: with `strict`.
        """
        if self.strict:
            raise PSAFallbackError(f"strict: attention would run as without PSA: {reason}")
        if reason not in self.counts:
            # The caller is deep inside of transformers: no line of the user's would be named.
            warnings.warn(f"attention runs as without PSA: {reason}", PSAFallbackWarning, stacklevel=2)
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def tell_traced(self, reason: str) -> None:
        """Note what a trace for a compiled graph meets; other patches trace anew, for graphs tell nobody.

        Raises:
            PSAFallbackError: with `strict`; dynamo wraps it in an error of its own, with its text.
        """
        self._tell_once(reason, self._patch)

    @torch.compiler.assume_constant_result
    def _tell_once(self, reason: str, _patch: str) -> None:
        """Runs while a graph is traced, and not with it; which patch it was is checked with the graph."""
        if self.strict or reason not in self.counts:
            self.tell(reason)
