"""What psa-generate loads of a tiny MiniMax-H3: all but its text encoder, for which embeddings are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from diffusers.modular_pipelines.minimax_h3 import encoders

from psa_testing.families.minimax_h3 import TEXT, WIDTH, tiny_h3_whole


def save_h3(folder: Path) -> None:
    """Write the components and modular_model_index.json."""
    tiny_h3_whole().save_pretrained(str(folder), overwrite_modular_index=True)


@contextmanager
def without_text_encoder() -> Iterator[None]:
    """Embeddings are random and need no component, of which Qwen3-VL's processor would need torchvision."""

    def encode(block: Any, components: Any, state: Any) -> tuple[Any, Any]:
        values = block.get_block_state(state)
        draw = torch.Generator().manual_seed(len(values.prompt))
        values.prompt_embeds = torch.randn(1, TEXT, WIDTH, generator=draw)
        values.text_token_tags = torch.full((TEXT,), components.text_tag, dtype=torch.long)
        block.set_block_state(state, values)
        return components, state

    first, second = encoders.MiniMaxH3TextEncoderStep, encoders.MiniMaxH3FL2VATextEncoderStep
    nothing = PropertyMock(return_value=[])
    with (
        patch.object(first, "expected_components", nothing),
        patch.object(second, "expected_components", nothing),
        patch.object(first, "__call__", encode),
        patch.object(second, "__call__", encode),
    ):
        yield
