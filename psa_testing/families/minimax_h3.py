"""MiniMax-H3: tiny random modular pipelines of the denoising blocks, and the published transformer.

The tiny pipelines have neither encoders nor decoders: a run gives embeddings and latents of conditions, and takes the
latents of the video. The published configuration is that of the class, whose defaults are the released checkpoint's;
the size is what its pipeline makes by default, 124 frames of 768 x 1344.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMiniMaxH3Audio,
    MiniMaxH3Blocks,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
)
from diffusers.modular_pipelines.minimax_h3 import before_denoise, modular_blocks_minimax_h3, references

from psa_diffusers.families.minimax_h3 import MiniMaxH3
from psa_testing.cases import Case, ParallelCase, Ranks
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published

TEXT, WIDTH = 8, 16
LATENTS = (24, 32)  # channels of the video and of the audio
AUDIO = 40  # latents a second of each of two channels
HEIGHT, WIDE = 64, 96  # a token is 32 x 32 pixels
FRAMES = 124  # the fewest that the pipeline makes, 37 of latents


def tiny_h3_transformer(heads: int = 2) -> MiniMaxH3Transformer3DModel:
    """Two blocks, of which the first 12 of 16 channels a head are rotated."""
    torch.manual_seed(0)
    return MiniMaxH3Transformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=LATENTS[0],
        audio_in_channels=LATENTS[1],
        text_dim=WIDTH,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    ).eval()


def tiny_h3(heads: int = 2, blocks: str = "MiniMaxH3CoreDenoiseStep") -> MiniMaxH3ModularPipeline:
    """The blocks of one workflow from the layout of the sequence to latents, with the transformer that they name."""
    pipe = getattr(modular_blocks_minimax_h3, blocks)().init_pipeline()
    name = "transformer_ref" if "Ref2VA" in blocks else "transformer"
    pipe.update_components(
        **{name: tiny_h3_transformer(heads)},
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )
    return pipe


def tiny_h3_whole() -> MiniMaxH3ModularPipeline:
    """All workflows from images and sound to frames and sound, but for the text encoder, which needs torchvision."""
    blocks = MiniMaxH3Blocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    torch.manual_seed(0)
    vae = AutoencoderKLMiniMaxH3(
        block_out_channels=(4,) * 6,
        layers_per_block=1,
        norm_num_groups=2,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
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
        sampling_rate=AUDIO * 200,
        latents_mean=[0.0] * LATENTS[1],
        latents_std=[1.0] * LATENTS[1],
    )
    pipe.update_components(
        transformer=tiny_h3_transformer(),
        transformer_ref=tiny_h3_transformer(),
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        scheduler=MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        reference_image_short_edge=64,
    )
    return pipe


def latents_of(pipe: MiniMaxH3ModularPipeline, arguments: Inputs, name: str = "latents") -> torch.Tensor:
    """Run a pipeline; the latents of the video, or what else it has by a name, as `audio_latents`."""
    return pipe(**arguments).get(name)


def _normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def embeddings(tokens: int = TEXT, vision: tuple[int, int] = (0, 0)) -> Inputs:
    """Embeddings of a prompt; those from one place to another are of what a condition shows, tagged as video."""
    tags = torch.ones(tokens, dtype=torch.long)
    tags[slice(*vision)] = 0
    return {"prompt_embeds": _normal(1, tokens, WIDTH), "text_token_tags": tags}


def keyframes(*anchors: str, height: int = HEIGHT, width: int = WIDE) -> Inputs:
    """Keyframes at the first or the last frame, of the video's size."""
    latents = [_normal(1, LATENTS[0], 1, height // 16, width // 16, seed=2 + i) for i in range(len(anchors))]
    return {"keyframe_anchors": anchors, "condition_latents": latents}


def conditions(*kinds: str) -> Inputs:
    """References: images and videos of sizes of their own, a voice, and a video with its sound."""
    made, video, audio = [], [], []
    for seed, kind in enumerate(kinds):
        if kind == "image":
            made.append(references.MiniMaxH3ImageReference(image=None))
            video.append(_normal(1, LATENTS[0], 1, 4, 4, seed=seed))
        elif kind == "voice":
            made.append(references.MiniMaxH3AudioReference(audio=None))
            audio.append(_normal(20, LATENTS[1], seed=seed))
        else:
            made.append(references.MiniMaxH3VideoReference(frames=None, audio=torch.zeros(2, 1)))
            video.append(_normal(1, LATENTS[0], 7, HEIGHT // 16, WIDE // 16, seed=seed))
            audio.append(_normal(30, LATENTS[1], seed=seed))
    return {"normalized_references": made, "condition_latents": video, "audio_condition_latents": audio}


def layout(
    frames: int, height: int, width: int, text: int, *, audio: int = 2, anchors: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """What a pipeline tells the transformer of the rows, for a video of so many latents; on the CPU.

    Args:
        audio: latents of each of its two channels.
    """
    with torch.device("cpu"):
        names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
        rows = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            torch.ones(text, dtype=torch.long), frames, height, width, audio, (1, 2, 2), 2, 2, 0, anchors
        )
        return dict(zip(names, rows, strict=False))


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    frames, height, width = latents[2:]
    text = noise.tokens(256)
    # 5 of latents are 17 frames, the last 2 are 5; of so many frames' sound.
    audio = 2 if noise.tiny else round(((frames - 2) // 5 * 17 + 5) / 24 * AUDIO)
    rows = layout(frames, height, width, text, audio=audio)
    # The sound has a schedule of its own; text has the video's timestep.
    indices = (rows["token_tags"] == 2).long()
    # On the meta device the rows keep their values, which the grid is read from.
    place = "cpu" if noise.device == "meta" else noise.device
    return {
        **{name: tensor.to(place) for name, tensor in rows.items()},
        "hidden_states": noise(1, len(rows["video_indices"]), 4 * latents[1]),
        "audio_hidden_states": noise(1, 2 * audio, config.audio_in_channels),
        "encoder_hidden_states": noise.text(256, config.text_dim),
        "timestep": torch.tensor([0.25, 0.5], device=noise.device),
        "timestep_indices": indices.to(place),
    }


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "text_dim": 32,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    }


_RUN: Inputs = {
    "prompt": None,
    "output_type": None,
    # Of so many points of its schedule the last one is the end.
    "num_inference_steps": 5,
    "height": HEIGHT,
    "width": WIDE,
    "num_frames": FRAMES,
    **embeddings(),
}
_TEXT = Case(
    tiny_h3,
    _RUN,
    ({"height": 96, "width": 64, **embeddings(5)}, {"num_frames": 141, "height": 64, "width": 64}),
    one_each=True,
    fuses=True,
    call=latents_of,
)
_KEYFRAMES = Case(
    partial(tiny_h3, blocks="MiniMaxH3FL2VACoreDenoiseStep"),
    {**_RUN, **embeddings(TEXT, (2, 5)), **keyframes("first", "last")},
    (keyframes("last"), {"height": 96, "width": 64, **keyframes("first", height=96, width=64)}),
    call=latents_of,
)
_REFERENCES = Case(
    partial(tiny_h3, blocks="MiniMaxH3Ref2VACoreDenoiseStep"),
    {**_RUN, **embeddings(TEXT, (2, 5)), **conditions("image", "voice", "video")},
    (conditions("video"), {"num_frames": 141, "height": 96, "width": 64, **conditions("video", "image")}),
    call=latents_of,
)

TESTS = FamilyTests(
    family=MiniMaxH3,
    cases={"minimax-h3": _TEXT, "minimax-h3-fl2va": _KEYFRAMES, "minimax-h3-ref2va": _REFERENCES},
    networks={"MiniMaxH3Transformer3DModel": Network(_inputs, _toy, reads_masks=True)},
    published=(
        Published(
            "MiniMaxAI/MiniMax-H3",
            "MiniMaxH3Transformer3DModel",
            {},
            latents=(1, 24, 37, 48, 84),
            layers=50,
            heads=56,
            head_dim=128,
            grid=(37, 24, 42),
            toy=True,
        ),
    ),
    parallel={
        "minimax-h3": ParallelCase(
            Case(partial(tiny_h3, 4), _RUN, call=latents_of),
            (Ranks(2), Ranks(2, "patch", embeddings(7), any_length=True)),
        ),
    },
)
