"""A copy of a patched transformer is not patched: its modules get copies of their own processors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from psa_diffusers.patch.arguments import with_names
from psa_diffusers.patch.dense_reasons import PSAFallbackWarning
from psa_diffusers.patch.sites import ATTRIBUTE, NotPickled, Site, publish, site_of

COPIED = (
    "attention is dense: this transformer is a copy of a patched one, and not patched itself; set a PSAProcessor of "
    "its own, PSAProcessor(pipe, ...)"
)


class CopiedProcessor(NotPickled):
    """Takes the place of the PSAProcessor in a copy, and calls each module's own processor."""

    def __init__(self) -> None:
        self._told = False

    @with_names
    def __call__(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own processor."""
        if not self._told and not torch.compiler.is_compiling():
            self._told = True
            warnings.warn(COPIED, PSAFallbackWarning, stacklevel=2)
        site: Any = site_of(attn)
        return site.call_original(attn, args, kwargs)


def copied_processor(sites: Mapping[torch.nn.Module, Site], memo: dict[int, Any]) -> CopiedProcessor:
    """The processor for a copy that is being made; the copied modules get copies of their sites.

    Args:
        sites: sites of the modules that are copied.
        memo: that of `copy.deepcopy`: what was copied so far, by the id of the original.
    """
    for attn, site in sites.items():
        if id(attn) in memo:  # its attributes are being copied right now, so none may be added
            vars(memo[id(attn)])[ATTRIBUTE] = copy.deepcopy(site, memo)
        else:
            publish(attn, site)
    return CopiedProcessor()


def own_processor(attn: torch.nn.Module) -> Any:
    """The processor that computes a module's attention: in a copy the module's own one."""
    found: Any = attn.processor
    site = site_of(attn)
    return site.original if isinstance(found, CopiedProcessor) and site is not None else found
