"""A tiny MiniMax-H3, whole but for its text encoder: what psa-generate loads and calls, with pictures and sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines.minimax_h3 import encoders

from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput

WIDTH, RATE = 16, 8000
TEXT_STEPS = (encoders.MiniMaxH3TextEncoderStep, encoders.MiniMaxH3FL2VATextEncoderStep)
KIND = PipelineKind(
    image="first or none",
    size_step=32,
    compression=(17, 16),
    frame_rest=5,
    # 5 to 15 seconds.
    frame_range=(124, 345),
    fps=24,
    layers=(("num_layers", 50),),
    sound=SoundOutput("audio_sampling_rate"),
    guided=False,
    modular=True,
    workflows=("t2va", "fl2va"),
    idle_steps=1,
)


def save_h3(folder: Path) -> None:
    """Write a modular pipeline whose sound has 8000 samples a second."""
    torch.manual_seed(0)
    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        text_dim=WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    vae = AutoencoderKLMiniMaxH3(
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        decoder_num_register_tokens=1,
        decoder_ffn_mult=1,
    )
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        encoder_rates=(10, 20),
        latent_dim=32,
        num_attention_heads=1,
        decoder_dim=8,
        decoder_rates=(10, 20),
        decoder_kernel_sizes=(20, 40),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        sampling_rate=RATE,
        latents_mean=[0.0] * 32,
        latents_std=[1.0] * 32,
    )
    with without_text_encoder():
        pipe = MiniMaxH3ModularPipeline()
        pipe.update_components(
            transformer=transformer.eval(),
            vae=vae.eval(),
            audio_vae=audio_vae.eval(),
            scheduler=MiniMaxH3Scheduler(shift=12.0),
            audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        )
        pipe.save_pretrained(str(folder), overwrite_modular_index=True)


@contextmanager
def without_text_encoder() -> Iterator[None]:
    """Embeddings are random and need no component, of which Qwen3-VL's processor would need torchvision."""

    def encode(block: Any, components: Any, state: Any) -> tuple[Any, Any]:
        values = block.get_block_state(state)
        draw = torch.Generator().manual_seed(len(values.prompt))
        values.prompt_embeds = torch.randn(1, 5, WIDTH, generator=draw)
        values.text_token_tags = torch.full((5,), components.text_tag, dtype=torch.long)
        block.set_block_state(state, values)
        return components, state

    first, second = TEXT_STEPS
    nothing = PropertyMock(return_value=[])
    with (
        patch.object(first, "expected_components", nothing),
        patch.object(second, "expected_components", nothing),
        patch.object(first, "__call__", encode),
        patch.object(second, "__call__", encode),
    ):
        yield
