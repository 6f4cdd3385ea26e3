"""What a model family says about its transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch


class ModelFamily(ABC):
    """One architecture; nothing is instantiated.

    Attributes:
        name: as users know it.
        transformers: names of the diffusers classes that the family covers.
    """

    name: ClassVar[str]
    transformers: ClassVar[tuple[str, ...]]

    @staticmethod
    @abstractmethod
    def self_attentions(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The video self-attention modules by name, first layer first."""

    @staticmethod
    @abstractmethod
    def token_grid(transformer: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[int, int, int]:
        """Video tokens along frames, height and width, from the latents that the transformer is given."""

    @staticmethod
    @abstractmethod
    def project(
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[B, N, H, D]`, normalised and rotated, of hidden states `[B, N, C]`."""

    @staticmethod
    @abstractmethod
    def output(attn: torch.nn.Module, attended: torch.Tensor) -> torch.Tensor:
        """Hidden states `[B, N, C]` of the attention output `[B, N, H, D]`."""
