"""Cosmos 1, 2 and 2.5: video tokens attend each other alone; text and images have cross-attention of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.family import AttentionCall, ModelFamily
from psa_diffusers.families.parts import first_attentions, project_out, rotate_halves, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind

if TYPE_CHECKING:
    import torch


class Cosmos(ModelFamily):
    """CosmosTransformer3DModel: text, image and video to world, and Transfer 2.5.

    It has no `set_attn_processor`: `apply_psa` patches it. Frames of a condition are among those of the video. The
    blocks of Transfer's control network are no part of the transformer, and stay as they are.
    """

    name = "Cosmos 1, 2 and 2.5"
    order = 45
    transformers = ("CosmosTransformer3DModel",)
    processors = ("CosmosAttnProcessor2_0",)

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        sizes = inputs["hidden_states"].shape[2:]
        frames, height, width = (
            size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)
        )
        return frames, height, width

    @staticmethod
    def timestep(inputs: Mapping[str, Any]) -> Any:
        # Each frame `[B, 1, frames, 1, 1]` may have its own, and conditions, which come first, a larger one at the end.
        timestep: Any = inputs.get("timestep")
        return timestep[:, :, -1] if getattr(timestep, "ndim", 0) == 5 else timestep

    @staticmethod
    def noisy_part(inputs: Mapping[str, Any]) -> torch.Tensor | None:
        # Cosmos 1 gives conditions, which come first, other noise in each guidance branch.
        latents = inputs.get("hidden_states")
        return None if latents is None else latents[:, :, -1:]

    @staticmethod
    def timesteps(scheduler: Any) -> torch.Tensor:
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or hasattr(scheduler, "precondition_noise"):
            return scheduler.timesteps  # Cosmos 1: an EDM scheduler's timesteps are what its models are given
        sigmas = sigmas[: len(scheduler.timesteps)]
        # Cosmos 2 is given the share of noise in a sum of video and noise, Cosmos 2.5 has such a share for its sigma.
        return sigmas / (1 + sigmas) if float(sigmas.max()) > 1 else sigmas

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        query, key, value = split_heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if call.rotary_emb is not None:
            # The tables `[N, D]` hold all angles twice.
            cos, sin = (table[:, None, : table.shape[-1] // 2] for table in call.rotary_emb)
            query, key = rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)
        return query, key, value

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        return project_out(attn, video)


_KIND = PipelineKind(layers=(("num_layers", 28),), packages=("cosmos_guardrail", "torchvision"))
PIPELINES = {
    "CosmosTextToWorldPipeline": _KIND,
    "CosmosVideoToWorldPipeline": replace(_KIND, image="first"),
    "Cosmos2VideoToWorldPipeline": replace(_KIND, image="first"),
    "Cosmos2_5_PredictBasePipeline": replace(_KIND, image="first or none"),
    "Cosmos2_5_TransferPipeline": replace(
        _KIND,
        in_code_only="it needs a control video, which this command has no option for; "
        "patch it in Python with apply_psa(pipe)",
    ),
    "Cosmos2TextToImagePipeline": replace(
        _KIND,
        in_code_only="it makes images, and this command makes videos; patch it in Python with apply_psa(pipe)",
    ),
}
# The pipelines' own, which they use where none is given.
_NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, "
    "shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed "
    "scenes, poor color balance, washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, "
    "color banding, unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor quality."
)
_PREDICT25_2B = ModelCard(
    name="cosmos2.5-2b",
    hub_id="nvidia/Cosmos-Predict2.5-2B",
    revision="diffusers/base/post-trained",
    about="Cosmos Predict 2.5 text, or text and an image, to video, 2B, 704p at 16 fps",
    pipeline="Cosmos2_5_PredictBasePipeline",
    height=704,
    width=1280,
    frames=93,
    steps=36,
    guidance=7.0,
    fps=16,
    negative_prompt=_NEGATIVE_PROMPT,
)
_PREDICT2_2B = replace(
    _PREDICT25_2B,
    name="cosmos2-i2v-2b",
    hub_id="nvidia/Cosmos-Predict2-2B-Video2World",
    revision=None,
    about="Cosmos Predict 2 image to video, 2B, 704p at 16 fps",
    pipeline="Cosmos2VideoToWorldPipeline",
    steps=35,
)
_7B = replace(
    _PREDICT25_2B,
    name="cosmos-7b",
    hub_id="nvidia/Cosmos-1.0-Diffusion-7B-Text2World",
    revision=None,
    about="Cosmos 1 text to video, 7B, 704p at 30 fps",
    pipeline="CosmosTextToWorldPipeline",
    frames=121,
    fps=30,
)
_7B_I2V = replace(
    _7B,
    name="cosmos-i2v-7b",
    hub_id="nvidia/Cosmos-1.0-Diffusion-7B-Video2World",
    about="Cosmos 1 image to video, 7B, 704p at 30 fps",
    pipeline="CosmosVideoToWorldPipeline",
)
CARDS = (
    _PREDICT25_2B,
    _PREDICT2_2B,
    replace(
        _PREDICT2_2B,
        name="cosmos2-i2v-14b",
        hub_id="nvidia/Cosmos-Predict2-14B-Video2World",
        about="Cosmos Predict 2 image to video, 14B, 704p at 16 fps",
    ),
    _7B,
    replace(
        _7B,
        name="cosmos-14b",
        hub_id="nvidia/Cosmos-1.0-Diffusion-14B-Text2World",
        about="Cosmos 1 text to video, 14B, 704p at 30 fps",
    ),
    _7B_I2V,
    replace(
        _7B_I2V,
        name="cosmos-i2v-14b",
        hub_id="nvidia/Cosmos-1.0-Diffusion-14B-Video2World",
        about="Cosmos 1 image to video, 14B, 704p at 30 fps",
    ),
)
