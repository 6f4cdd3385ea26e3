"""disable_psa and psa_stats: a pipeline's patch, found on the pipeline instead of on its handle."""

from __future__ import annotations

from typing import Any

from psa_diffusers.patch.modules import attention_modules, find_transformers
from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.patch.stats import RunStats


class NotPatchedError(ValueError):
    """The pipeline has no PSA patch, or several where one is asked about; the message says which."""


def disable_psa(pipe: Any) -> None:
    """Give the pipeline's transformers their own attention processors back, however they were patched.

    Does nothing to a pipeline that is not patched.

    Examples:
        >>> apply_psa(pipe, "psa-3")
        >>> disable_psa(pipe)

    Args:
        pipe: a diffusers pipeline.

    Raises:
        UnsupportedModelError: it has no transformer at all.
        RuntimeError: it has a PSAProcessor that was made for another pipeline, so that nobody knows its own ones.
    """
    for processor in _processors(pipe):
        processor.restore()


def psa_stats(pipe: Any) -> RunStats:
    """Return the statistics of a patched pipeline's last run; waits for the device.

    Examples:
        >>> pipe.transformer.set_attn_processor(PSAProcessor(pipe, "psa-3"))
        >>> video = pipe("a cat playing the piano").frames[0]
        >>> psa_stats(pipe).density_sparse

    Args:
        pipe: a diffusers pipeline that `apply_psa` or `set_attn_processor(PSAProcessor(...))` has patched.

    Raises:
        NotPatchedError: it is not patched, or its transformers have patches of their own.
        UnsupportedModelError: it has no transformer at all.
        RuntimeError: it has a PSAProcessor that was made for another pipeline.
    """
    found = _processors(pipe)
    if not found:
        raise NotPatchedError(f"{type(pipe).__name__} is not patched; call apply_psa(pipe, ...) first")
    if len(found) > 1:
        raise NotPatchedError(
            f"{type(pipe).__name__} has {len(found)} patches; ask each PSAProcessor for its stats(), or patch all its "
            "transformers at once with apply_psa(pipe, ...)"
        )
    return found[0].stats()


def _processors(pipe: Any) -> list[PSAProcessor]:
    """The processors that are set on any attention module of the pipeline's transformers, each once.

    Raises:
        RuntimeError: one was made for another pipeline, and can neither tell of this one nor be taken off it.
    """
    found: dict[int, PSAProcessor] = {}
    for transformer in find_transformers(pipe).values():
        for attn in attention_modules(transformer):
            processor: Any = attn.processor
            if isinstance(processor, PSAProcessor):
                processor.original_of(attn)
                found[id(processor)] = processor
    return list(found.values())
