"""Mochi: joint attention of video and, after it, text with projections of its own; heads differ in their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import (
    concatenate,
    first_attentions,
    normalise,
    one_by_one,
    project_added,
    project_out,
    split_heads,
    text_only_mask,
)
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import Rotation

if TYPE_CHECKING:
    import torch


class Mochi(ModelFamily):
    """MochiTransformer3DModel. It has no `set_attn_processor`: `apply_psa` patches it."""

    name = "Mochi"
    order = 60
    transformers = ("MochiTransformer3DModel",)
    processors = ("MochiAttnProcessor2_0",)
    text = "after"
    stock_traceable = False  # it gathers the real text tokens, whose number only the mask's content tells

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, height, width = inputs["hidden_states"].shape[2:]
        patch = transformer.config.patch_size
        return frames, height // patch, width // patch

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        assert call.encoder_hidden_states is not None, "its attention is always joint"
        of_queries, of_keys, of_values = project_added(attn, call.encoder_hidden_states)

        def placed(x: torch.Tensor, norm: torch.nn.Module | None) -> torch.Tensor:
            x = normalise(norm, split_heads(attn, x)[0])
            return x if call.rotary_emb is None else _rotate(call.rotary_emb, x)

        return one_by_one(
            call,
            lambda: concatenate(placed(attn.to_q(x), attn.norm_q), of_queries),
            lambda: concatenate(placed(attn.to_k(x), attn.norm_k), of_keys),
            lambda: concatenate(split_heads(attn, attn.to_v(x))[0], of_values),
        )

    @staticmethod
    def output(
        attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert text is not None, "its attention is always joint"
        text = text.flatten(2)
        # The last block has no use for its text.
        return project_out(attn, video), attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        return text_only_mask(call)

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any]:
        tables = split(0, 3, output=True)
        return {
            "rope": {0: tables, 1: tables},
            "transformer_blocks.0": {"hidden_states": split(1, 3)},
            "proj_out": gather(1, 3),
        }


# The tables `[N, H, D / 2]` are float32, and so is the rotation.
_rotate = Rotation(lambda cos, sin: (cos, sin))
PIPELINES = {"MochiPipeline": PipelineKind(layers=(("num_layers", 48),), compression=(6, 8), tiled_vae=True)}
CARDS = (
    ModelCard(
        name="mochi",
        hub_id="genmo/mochi-1-preview",
        about="Mochi 1 text to video, 10B, 480 x 848 at 30 fps",
        pipeline="MochiPipeline",
        height=480,
        width=848,
        frames=85,
        steps=64,
        guidance=4.5,
        fps=30,
        negative_prompt="",
    ),
)
