"""Published transformers: their configurations, what their pipelines give them at full size, and toys of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import diffusers
import torch

Inputs = dict[str, Any]
Latents = tuple[int, ...]
TIMESTEP = 20
TOY_TEXT = 16  # text tokens of a toy
TOY_TOKENS = (3, 8, 8)  # its video tokens along frames, height and width


@dataclass(frozen=True)
class Published:
    """A checkpoint, and what a family must make of it.

    Attributes:
        checkpoint: its repository.
        model: class of its transformer.
        config: arguments of that class that differ from its defaults, or matter here.
        latents: shape `[1, ...]` of the hidden states that its pipeline gives for the default video, or what
            `Network.inputs` makes them from.
        layers, heads, head_dim: of its video self-attention.
        grid: video tokens along frames, height and width for the default video.
        text: tokens of joint attention with them, padding included.
        inputs: what else its pipeline tells the transformer about the size.
        vae: what the configuration of its VAE says of compression.
        experts: how many transformers it has.
        toy: whether a toy of it is run: true for one of each class, and those whose inputs differ from the others.
    """

    checkpoint: str
    model: str
    config: Mapping[str, Any]
    latents: Latents
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text: int = 0
    inputs: Mapping[str, int] = field(default_factory=dict)
    vae: Mapping[str, int] = field(default_factory=dict)
    experts: int = 1
    toy: bool = False

    @property
    def name(self) -> str:
        """The checkpoint without its owner."""
        return self.checkpoint.split("/")[1]

    def shapes(self, **changes: Any) -> torch.nn.Module:
        """The transformer on the meta device, which has shapes alone: numbers are not drawn for it.

        Args:
            changes: arguments of its class in place of the published ones.
        """
        with torch.device("meta"), patch.object(torch.nn.Linear, "reset_parameters", lambda module: None):
            return getattr(diffusers, self.model)(**{**self.config, **changes})


@dataclass(frozen=True)
class Noise:
    """Random inputs of one kind and place.

    Attributes:
        padding: share of the text tokens that are padding.
        tiny: whether texts are a toy's.
    """

    dtype: torch.dtype
    device: str
    padding: float
    tiny: bool

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def tokens(self, published: int) -> int:
        return TOY_TEXT if self.tiny else published

    def text(self, tokens: int, width: int) -> torch.Tensor:
        """Embeddings `[1, T, width]`."""
        return self(1, self.tokens(tokens), width)

    def padded_text(self, tokens: int, width: int, suffix: str = "") -> Inputs:
        """Embeddings, and a mask `[1, T]` that is 0 at the last ones."""
        embeds = self.text(tokens, width)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
        mask[:, mask.shape[1] - int(self.padding * mask.shape[1]) :] = 0
        return {f"encoder_hidden_states{suffix}": embeds, f"encoder_attention_mask{suffix}": mask}

    def timestep(self, *shape: int) -> torch.Tensor:
        return torch.full(shape or (1,), TIMESTEP, device=self.device)


def square_latents(published: Published) -> Latents:
    """`[1, C, frames, height, width]` of a toy with patches of one frame and 2 x 2 latents."""
    frames, height, width = TOY_TOKENS
    return (1, published.latents[1], frames, 2 * height, 2 * width)


def query_projection(attn: Any) -> torch.nn.Linear:
    """The linear of an attention module that makes its queries."""
    return getattr(attn, "to_q", None) or attn.to_query


def head_count(attn: Any) -> int:
    """Of an attention module."""
    return getattr(attn, "heads", None) or attn.num_heads


@dataclass(frozen=True)
class Network:
    """A transformer's class, at full size and as a toy with two narrow heads.

    Attributes:
        inputs: what its pipeline gives its forward besides hidden states and one timestep, or in their place, by name:
            from its configuration and the shape of the hidden states.
        toy: arguments of its class that make a toy, in place of the published ones, which are given.
        toy_latents: shape of a toy's hidden states, `TOY_TOKENS` of video.
        toy_sizes: what a toy is told about its size, where the published one is told it too (`Published.inputs`).
        one_block: arguments of its class that leave one block of each kind.
        kinds: how many kinds there are.
        frames_first: whether frames come before channels in its latents.
        channels_last: whether channels come last in them.
        reads_masks: whether its forward looks into its masks, which have no values on the meta device, or takes what
            tells the grid, which has its values elsewhere.
    """

    inputs: Callable[[Any, Latents, Noise], Inputs]
    toy: Callable[[Mapping[str, Any]], dict[str, Any]]
    toy_latents: Callable[[Published], Latents] = square_latents
    toy_sizes: Mapping[str, int] = field(default_factory=dict)
    one_block: Mapping[str, Any] = field(default_factory=lambda: {"num_layers": 1})
    kinds: int = 1
    frames_first: bool = False
    channels_last: bool = False
    reads_masks: bool = False

    def noise_inputs(self, config: Any, latents: Latents, noise: Noise) -> Inputs:
        """All arguments of its forward, by name."""
        common = {"hidden_states": noise(*latents), "timestep": noise.timestep()}
        return {**common, **self.inputs(config, latents, noise)}
