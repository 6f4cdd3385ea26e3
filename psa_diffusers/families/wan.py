"""Wan 2.1 and 2.2: video tokens attend each other alone; text and images have cross-attention of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import linears, one_by_one, project_out, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.rotation import Rotation

if TYPE_CHECKING:
    import torch


class Wan(ModelFamily):
    """Text, image and video to video, VACE, Animate and Lucy Edit; Wan 2.2's two experts are two transformers."""

    name = "Wan 2.1 and 2.2"
    order = 10
    transformers: ClassVar[tuple[str, ...]] = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
    )
    processors = ("WanAttnProcessor",)

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        # VACE's control blocks run first, but are named last: so a preset's layer numbers mean the same blocks as in
        # the model without them.
        groups = [name for name in ("blocks", "vace_blocks") if hasattr(transformer, name)]
        blocks = (
            (f"{name}.{index}", block) for name in groups for index, block in enumerate(getattr(transformer, name))
        )
        return {name: block.attn1 for name, block in blocks}

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        sizes = inputs["hidden_states"].shape[2:]
        frames, height, width = (
            size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)
        )
        return frames, height, width

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = linears(attn, call.hidden_states)

        def placed(x: torch.Tensor) -> torch.Tensor:
            (x,) = split_heads(attn, x)
            return x if call.rotary_emb is None else _rotate(call.rotary_emb, x)

        return one_by_one(
            call,
            lambda: placed(attn.norm_q(query())),
            lambda: placed(attn.norm_k(key())),
            lambda: split_heads(attn, value())[0],
        )

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)


# The tables `[1, N, 1, D]` hold each angle twice.
_rotate = Rotation(lambda cos, sin: (cos[..., 0::2], sin[..., 1::2]))

_KIND = PipelineKind(exact_vae="AutoencoderKLWan")
PIPELINES = {
    "WanPipeline": _KIND,
    "WanImageToVideoPipeline": replace(_KIND, image="first"),
    "WanVACEPipeline": replace(
        _KIND, image="reference", image_latents=1, layers=(("num_layers", 40), ("vace_layers", 8))
    ),
    "LucyEditPipeline": replace(
        _KIND,
        in_code_only="it edits a video, which this command has no option for; patch it in Python with apply_psa(pipe)",
    ),
    "WanAnimatePipeline": replace(
        _KIND,
        in_code_only="it needs a video of a pose and one of a face, which this command has no options for; "
        "patch it in Python with apply_psa(pipe)",
    ),
}
_T2V = ModelCard(
    name="wan",
    hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    about="Wan 2.1 text to video, 1.3B, 480p",
    pipeline="WanPipeline",
    flow_shift=3.0,
)
_T2V_14B = replace(
    _T2V,
    name="wan-14b",
    hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    about="Wan 2.1 text to video, 14B, 720p",
    height=720,
    width=1280,
    flow_shift=5.0,
)
_TI2V_5B = replace(
    _T2V_14B,
    name="wan2.2-5b",
    hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    about="Wan 2.2 text to video, 5B, 720p at 24 fps",
    height=704,
    frames=121,
    fps=24,
)
CARDS = (
    _T2V,
    _T2V_14B,
    replace(
        _T2V,
        name="wan-i2v-14b-480p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        about="Wan 2.1 image to video, 14B, 480p",
        pipeline="WanImageToVideoPipeline",
    ),
    replace(
        _T2V_14B,
        name="wan-i2v-14b-720p",
        hub_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        about="Wan 2.1 image to video, 14B, 720p",
        pipeline="WanImageToVideoPipeline",
    ),
    replace(
        _T2V_14B,
        name="wan2.2-14b",
        hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        about="Wan 2.2 text to video, two 14B experts, 720p",
        steps=40,
        guidance=4.0,
        guidance_2=3.0,
        flow_shift=None,
    ),
    replace(
        _T2V,
        name="wan2.2-i2v-14b",
        hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        about="Wan 2.2 image to video, two 14B experts, 480p",
        pipeline="WanImageToVideoPipeline",
        steps=40,
        guidance=3.5,
        flow_shift=None,
    ),
    _TI2V_5B,
    replace(
        _TI2V_5B,
        name="wan2.2-i2v-5b",
        about="Wan 2.2 image to video, 5B, 720p at 24 fps (the same weights)",
        pipeline="WanImageToVideoPipeline",
    ),
    replace(
        _T2V,
        name="wan-vace-1.3b",
        hub_id="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        about="Wan 2.1 VACE text, or text and a reference image, to video, 1.3B, 480p",
        pipeline="WanVACEPipeline",
    ),
    replace(
        _T2V_14B,
        name="wan-vace-14b",
        hub_id="Wan-AI/Wan2.1-VACE-14B-diffusers",
        about="Wan 2.1 VACE text, or text and a reference image, to video, 14B, 720p",
        pipeline="WanVACEPipeline",
    ),
)
