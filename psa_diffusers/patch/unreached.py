"""Layers that the processor was made for, but that are attended by another one: why, if anything went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from psa_diffusers.patch.graph_ops import Layer, Site

Modules = Iterable[tuple[torch.nn.Module, Site]]


def unreached(modules: Modules, which: str, kind: type) -> Iterator[tuple[list[Layer], str]]:
    """Layers whose module has another processor, and the reason.

    Args:
        modules: all attention modules of the pipeline, and what is known of them.
        which: name of the transformer that is called.
        kind: the type of the processors that are in their place.
    """
    layers = [(attn, site) for attn, site in modules if site.layer is not None]
    here = [(attn.processor, site) for attn, site in layers if site.transformer == which]
    for processor, site in here:
        # As CogVideoX's `fuse_qkv_projections` sets one.
        if not isinstance(processor, kind) and processor is not site.original:
            yield (
                [site.layer],
                f"another processor, {type(processor).__name__}, replaced {kind.__name__}; patch again after such a "
                "change",
            )
    yield from _left_out(layers, here, which, kind)


def _left_out(
    layers: list[tuple[torch.nn.Module, Site]], here: list[tuple[Any, Site]], which: str, kind: type
) -> Iterator[tuple[list[Layer], str]]:
    """The expert of two that was left out, as `pipe.transformer.set_attn_processor` does with the second."""
    patched = {site.transformer for attn, site in layers if attn.processor is site.owner}
    left_out = [site.layer for processor, site in here if processor is site.original]
    if which not in patched and patched and left_out:
        yield (
            left_out,
            f"pipe.{which} was not patched; call pipe.{which}.set_attn_processor(processor) with the same "
            f"{kind.__name__}, or patch both experts with apply_psa(pipe)",
        )
