"""LTX-Video: video tokens attend each other alone; its latents come as a sequence of tokens already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import ReadOnce, first_attentions, last_grid, one_by_one, project_out, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import Rotation, every_other

if TYPE_CHECKING:
    import torch


class LTXVideo(ModelFamily):
    """LTXVideoTransformer3DModel: text and image to video, and conditions, whose tokens precede those of the video."""

    name = "LTX-Video"
    order = 50
    transformers = ("LTXVideoTransformer3DModel",)
    processors = ("LTXVideoAttnProcessor",)
    history = True
    replicates_text = True

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        # Pipelines with conditions, or for long videos, give coordinates instead of sizes.
        if inputs.get("video_coords") is not None:
            return _grid(inputs["video_coords"])
        sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
        if None in sizes:
            return None
        patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
        frames, height, width = sizes
        return frames // patch_t, height // patch, width // patch

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states

        def placed(x: torch.Tensor) -> torch.Tensor:
            return split_heads(attn, x if call.rotary_emb is None else _rotate(call.rotary_emb, x))[0]

        return one_by_one(
            call,
            lambda: placed(attn.norm_q(attn.to_q(x))),
            lambda: placed(attn.norm_k(attn.to_k(x))),
            lambda: split_heads(attn, attn.to_v(x))[0],
        )

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any]:
        # diffusers' own plan splits the text too, and its mask, which the cross-attention then has no use for.
        tables = split(1, 3, output=True)
        return {
            # Only pipelines with an image or conditions give each token a timestep of its own.
            "": {"hidden_states": split(1, 3), "timestep": split(1, 2)},
            "rope": {0: tables, 1: tables},
            "proj_out": gather(1, 3),
        }


# The tables `[B, N, H * D]` hold each angle twice; positions run through all heads.
_rotate = Rotation(every_other)
_grid = ReadOnce(lambda coordinates: last_grid(coordinates[0].cpu()))

_KIND = PipelineKind(layers=(("num_layers", 28),), size_step=32, compression=(8, 32))
PIPELINES = {"LTXPipeline": _KIND, "LTXImageToVideoPipeline": replace(_KIND, image="first")}
_CARD = ModelCard(
    name="ltx",
    hub_id="Lightricks/LTX-Video",
    about="LTX-Video text to video, 2B, 480 x 704 at 24 fps",
    pipeline="LTXPipeline",
    height=480,
    width=704,
    frames=161,
    steps=50,
    guidance=3.0,
    fps=24,
    negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
)
CARDS = (
    _CARD,
    replace(
        _CARD,
        name="ltx-i2v",
        about="LTX-Video image to video, 2B, 480 x 704 at 24 fps (the same weights)",
        pipeline="LTXImageToVideoPipeline",
    ),
)
