"""MiniMax-H3: one packed sequence of text, conditions, audio and, last, the video, which attend each other alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import (
    ReadOnce,
    last_grid,
    linears,
    normalise,
    one_by_one,
    project_out,
    split_heads,
)
from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput

if TYPE_CHECKING:
    import torch

VIDEO_TAG = 0  # of the rows of the video, of keyframes and of references


class MiniMaxH3(ModelFamily):
    """MiniMaxH3Transformer3DModel: text, keyframes and references to video with sound.

    The rows of the video to be made stand last, frame by frame. All rows before them are attended exactly, and their
    own queries are dense; those of the audio among them. The text's refiner is left alone.
    """

    name = "MiniMax-H3"
    order = 25
    transformers = ("MiniMaxH3Transformer3DModel",)
    processors = ("MiniMaxH3AttnProcessor",)
    history = True
    replicates_text = True

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return {f"transformer_blocks.{index}": block.attn for index, block in enumerate(transformer.transformer_blocks)}

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        positions, tags = inputs.get("position_ids"), inputs.get("token_tags")
        if positions is None or tags is None:
            return None
        return _grid(positions, tags)

    @staticmethod
    def tokens(inputs: Mapping[str, Any], grid: tuple[int, int, int]) -> int:
        return inputs["position_ids"].shape[0]

    @staticmethod
    def timestep(inputs: Mapping[str, Any]) -> Any:
        # Of the last row: audio has a schedule of its own, and conditions are held where they are nearly clean.
        timesteps, rows = inputs.get("timestep"), inputs.get("timestep_indices")
        return None if timesteps is None or rows is None else timesteps.index_select(0, rows[-1:])

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Its stock processor, too, reads the copy that fusing makes.
        query, key, value = linears(attn, call.hidden_states)

        def placed(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = normalise(norm, split_heads(attn, x)[0])
            return x if call.rotary_emb is None else _rotate(x, call.rotary_emb)

        return one_by_one(
            call,
            lambda: placed(query(), attn.norm_q),
            lambda: placed(key(), attn.norm_k),
            lambda: split_heads(attn, value())[0],
        )

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)


def _rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first channels of `[B, N, H, D]`, each with the one half as many further on; the others stay.

    Args:
        tables: cosines and sines `[N, channels]`, which hold each angle twice.
    """
    import torch

    half = tables[0].shape[-1] // 2
    cos, sin = (table[:, None, :half].to(x.dtype) for table in tables)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _read(positions: torch.Tensor, tags: torch.Tensor) -> tuple[int, int, int] | None:
    """The grid that the last rows form, of the rows at the end that all are video; None where there are none."""
    video = tags.cpu() == VIDEO_TAG
    rows = int(video.flip(0).int().cumprod(0).sum())
    return last_grid(positions[len(positions) - rows :].cpu().mT) if rows else None


_grid = ReadOnce(_read)


def _latent_frames(frames: int) -> int:
    return frames // 17 * 5 + 2  # the last 5 frames are 2 of latents


PIPELINES = {
    "MiniMaxH3ModularPipeline": PipelineKind(
        image="first or none",
        size_step=32,
        # 17 frames are 5 of latents; it makes 17 k + 5, from 5 to 15 seconds.
        frame_rest=5,
        frame_range=(124, 345),
        compression=(17, 16),
        latent_frames=_latent_frames,
        layers=(("num_layers", 50),),
        sound=SoundOutput("audio_sampling_rate"),
        fps=24,
        guided=False,
        modular=True,
        workflows=("t2va", "fl2va"),
        idle_steps=1,
        # Of its text encoder's processor.
        packages=("torchvision",),
    ),
}
CARDS = (
    ModelCard(
        name="minimax-h3",
        hub_id="MiniMaxAI/MiniMax-H3",
        about="MiniMax-H3 text or image to video with sound, 768 x 1344 at 24 fps; its guidance is distilled",
        pipeline="MiniMaxH3ModularPipeline",
        height=768,
        width=1344,
        frames=124,
        # Its schedule ends at the last of them: 49 forwards.
        steps=50,
        guidance=1.0,
        fps=24,
        negative_prompt="",
    ),
)
