"""The attention modules of a patched transformer: which layer each is, and which processor it had before."""

from __future__ import annotations

import copy
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from psa_diffusers.patch.arguments import argument_names
from psa_kernels import AttentionSpec
from psa_presets import Preset, TokenOrder

ATTRIBUTE = "psa_site"

_numbers = itertools.count()
_sites: weakref.WeakValueDictionary[int, LayerSite] = weakref.WeakValueDictionary()


class NotPickled:
    """Base of objects that belong to one transformer and its hooks in this process, and cannot leave it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a transformer patched with PSAProcessor cannot be pickled; call restore() first, and patch what is loaded "
            "with a PSAProcessor of its own"
        )


class PatchingProcessor(NotPickled, ABC):
    """The part of PSAProcessor that modules need which it imports itself."""

    # Written by diffusers' set_attention_backend and enable_parallelism, where a processor has them.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def has_backend(self) -> bool:
        """Whether diffusers has set an attention backend on this processor, or None since, which resets it."""
        return "_attention_backend" in vars(self)

    @abstractmethod
    def is_set(self) -> bool:
        """Whether any attention module of the pipeline has this processor."""

    @abstractmethod
    def arrive(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Take over a transformer whose forward begins, also from another patch, if this processor was set on it."""


@dataclass(frozen=True)
class Layer:
    """One video self-attention layer, as it is at all steps where the same rules for steps apply.

    Attributes:
        spec: what it computes; None if the preset keeps it dense.
        order: in which order its tokens form blocks.
        keeps_lists: whether its importance lists ever serve a second call.
        uncorrected: what it computes instead where nothing corrects its output; None if that is `spec` too.
    """

    name: str
    preset: Preset
    spec: AttentionSpec | None
    order: TokenOrder
    keeps_lists: bool
    uncorrected: AttentionSpec | None = None


class Site(NotPickled):
    """An attention module of a patched transformer, such as cross-attention to text, or of a copy of one.

    Attributes:
        original: the processor that the module had before.
        names: names of the arguments that this takes after the module, in order; None if it takes any.
        reads_video: whether its keys are the video's tokens, which ranks share, while its queries are others.
    """

    def __init__(self, original: Any, reads_video: bool = False) -> None:
        self.original, self.reads_video = original, reads_video
        self.names = argument_names(original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        """The site of a copy of the module, which is not patched."""
        return Site(copy.deepcopy(self.original, memo))

    def call_original(self, attn: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Call the module's own processor. As in diffusers, it gets only those named arguments that it takes."""
        names = self.names
        return self.original(attn, *args, **{name: kwargs[name] for name in kwargs if names is None or name in names})

    def by_name(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the module's own processor has for them."""
        # No zip of unequal lengths: inside a graph PyTorch 2.8 takes it for an error.
        names = self.names or ()
        return {**{names[place]: args[place] for place in range(min(len(names), len(args)))}, **kwargs}


class LayerSite(Site):
    """The attention module of a layer.

    Attributes:
        patch: the `Patch` of its transformer.
        layer: its layer, where no rule for steps applies; `Forward.at_step` has it as it is at a step.
        may_be_sparse: whether the preset makes it sparse at any step of any run.
        not_imitated: why the patch does not know what `original` computes, so that the layer stays dense; or None.
        number: 0-dim tensor on the CPU, which names the site to the operators behind a graph.
        skips_scores: whether a guider replaces attention by its values in the current forward; only `original` can do
            that.
        in_graph: whether a compiled block calls the patch's attention in the current forward; if not, it calls
            `original`.
        shared: whether ranks share the current forward.
        breaks_graphs: whether `original` shares it in a way that cannot be part of a graph, and can be imitated.
        exchange: what a compiled block has begun to exchange with them.
    """

    def __init__(self, patch: Any, original: Any, layer: Layer) -> None:
        super().__init__(original)
        self.patch, self.layer = patch, layer
        preset = layer.preset
        self.may_be_sparse = not preset.is_all_dense and (layer.spec is not None or preset.may_undo_dense)
        self.not_imitated: str | None = None
        self.skips_scores = self.in_graph = self.shared = self.breaks_graphs = False
        self.exchange: Any = None
        number = next(_numbers)
        with torch.inference_mode(False), torch.device("cpu"):
            self.number = torch.tensor(number)
        _sites[number] = self


def site_numbered(number: torch.Tensor) -> LayerSite:
    """The site that a `LayerSite.number` names."""
    return _sites[int(number)]


def site_of(attn: torch.nn.Module) -> Site | None:
    """The site that `publish` noted on a module; unlike a dictionary of modules, it can be read inside a graph."""
    return getattr(attn, ATTRIBUTE, None)


def publish(attn: torch.nn.Module, site: Site) -> None:
    """Note on a module which site it is."""
    if site_of(attn) is not site:
        setattr(attn, ATTRIBUTE, site)


def withdraw(attn: torch.nn.Module, site: Site) -> None:
    """Undo `publish`, unless another patch has since noted its own."""
    if site_of(attn) is site:
        delattr(attn, ATTRIBUTE)
