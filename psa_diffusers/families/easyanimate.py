"""EasyAnimate: joint attention of text and, after it, video; text has projections of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import (
    first_attentions,
    join,
    normalise,
    project_added,
    project_out,
    split_heads,
)
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import rotate_tokens

if TYPE_CHECKING:
    import torch


class EasyAnimate(ModelFamily):
    """EasyAnimateTransformer3DModel: text to video, inpainting and control.

    The model masks no text: its text encoder's padding is attended as in diffusers.
    """

    name = "EasyAnimate"
    order = 100
    transformers = ("EasyAnimateTransformer3DModel",)
    processors = ("EasyAnimateAttnProcessor2_0",)
    text = "before"

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
        text = call.encoder_hidden_states
        assert text is not None, "its attention is always joint"
        query, key, value = _project(attn, call.hidden_states)
        query, key = (rotate_tokens(call.rotary_emb, x) for x in (query, key))
        # Blocks after the first `mmdit_layers` have one set of projections for both.
        of_text = project_added(attn, text) if attn.add_q_proj is not None else _project(attn, text)
        return join(of_text, (query, key, value))

    @staticmethod
    def output(
        attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert text is not None, "its attention is always joint"
        attended = text.flatten(2)
        # The other blocks leave text as it is attended.
        return project_out(attn, video), attended if attn.to_add_out is None else attn.to_add_out(attended)


def _project(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return normalise(attn.norm_q, query), normalise(attn.norm_k, key), value


_VIDEO_NEEDED = "it needs a video{}, which this command has no option for; patch it in Python with apply_psa(pipe)"
PIPELINES = {
    "EasyAnimatePipeline": PipelineKind(layers=(("num_layers", 48),)),
    "EasyAnimateInpaintPipeline": PipelineKind(in_code_only=_VIDEO_NEEDED.format(" and a mask")),
    "EasyAnimateControlPipeline": PipelineKind(in_code_only=_VIDEO_NEEDED.format(" of a control signal")),
}
CARDS = (
    ModelCard(
        name="easyanimate",
        hub_id="alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers",
        about="EasyAnimate 5.1 text to video, 12B, 512 x 512 at 8 fps",
        pipeline="EasyAnimatePipeline",
        height=512,
        width=512,
        frames=49,
        steps=50,
        guidance=6.0,
        fps=8,
        negative_prompt="bad detailed",
    ),
)
