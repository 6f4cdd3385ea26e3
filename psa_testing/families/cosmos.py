"""Cosmos 1, 2 and 2.5: tiny random pipelines with 2 layers and 2 heads of 16, and the published transformers.

The configurations are those of `scripts/convert_cosmos_to_diffusers.py` of diffusers (58eb52c), which made the
checkpoints; schedulers are made as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosControlNetModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from psa_diffusers.families.cosmos import Cosmos
from psa_testing.cases import GUIDED, IMAGE, SIZES, SMALL_TEXT, TWO_PROMPTS, Case, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import TEXT_DIM, tiny_text_encoder, tiny_tokenizer, tiny_vae
from psa_testing.torchvision_stand_in import provide_torchvision

provide_torchvision()

TRANSFORMER: dict[str, Any] = {
    "in_channels": 17,
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_DIM,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "extra_pos_embed_type": None,
}
# Cosmos 2.5 projects the hidden states of all layers of its text encoder.
PROJECTION: dict[str, Any] = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 32,
    "encoder_hidden_states_channels": TEXT_DIM,
}


class Unguarded:
    """Stands in for the guardrail, which is a package and models of its own: it lets everything pass."""

    def to(self, *device: Any) -> Unguarded:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def _make(pipeline: Callable[..., Any], transformer: Mapping[str, Any], **parts: Any) -> Any:
    torch.manual_seed(0)
    return pipeline(
        transformer=CosmosTransformer3DModel(**{**TRANSFORMER, **transformer}).eval(),
        safety_checker=Unguarded(),
        **parts,
    )


def _cosmos1(pipeline: Callable[..., Any], in_channels: int) -> Any:
    vae = AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8),
        decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(),
        num_layers=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    ).eval()
    scheduler = EDMEulerScheduler(final_sigmas_type="sigma_min")
    texts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    config = {"in_channels": in_channels, "extra_pos_embed_type": "learnable"}
    return _make(pipeline, config, vae=vae, scheduler=scheduler, **texts)


def tiny_cosmos() -> CosmosTextToWorldPipeline:
    """Text to world: the model is given the logarithm of the noise level."""
    return _cosmos1(CosmosTextToWorldPipeline, 16)


def tiny_cosmos_i2v() -> CosmosVideoToWorldPipeline:
    """Image or video to world: a mask tells which frames are known."""
    return _cosmos1(CosmosVideoToWorldPipeline, 17)


def _cosmos2(pipeline: Callable[..., Any], in_channels: int) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    texts = {"text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}
    return _make(pipeline, {"in_channels": in_channels}, vae=tiny_vae(), scheduler=scheduler, **texts)


def tiny_cosmos2() -> Cosmos2VideoToWorldPipeline:
    """Image or video to world: every frame has its own timestep, those that are known nearly 0."""
    return _cosmos2(Cosmos2VideoToWorldPipeline, 17)


def tiny_cosmos2_t2i() -> Cosmos2TextToImagePipeline:
    """Text to image."""
    return _cosmos2(Cosmos2TextToImagePipeline, 16)


def _cosmos25(pipeline: Callable[..., Any], transformer: Mapping[str, Any], **parts: Any) -> Any:
    torch.manual_seed(0)
    text_config = {
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision_config = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config)
    tokenizer = tiny_tokenizer()
    # Without the system's words, which are longer than all that is read.
    tokenizer.chat_template = (
        "{% for message in messages if message.role == 'user' %}{{ message.content[0].text }}{% endfor %}"
    )
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01
    )
    return _make(
        pipeline,
        {**PROJECTION, **transformer},
        vae=tiny_vae(),
        scheduler=scheduler,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        **parts,
    )


def tiny_cosmos25() -> Cosmos2_5_PredictBasePipeline:
    """Text, image or video to world."""
    return _cosmos25(Cosmos2_5_PredictBasePipeline, {})


def tiny_cosmos25_transfer() -> Cosmos2_5_TransferPipeline:
    """Control video to world, chunk by chunk: a control network of one block, and cross-attention that reads images."""
    image = {"img_context_dim_in": 8, "img_context_dim_out": 32}
    torch.manual_seed(1)
    controlnet = CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=18,
        latent_channels=18,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        **PROJECTION,
        **image,
    ).eval()
    config = {**image, "img_context_num_tokens": 4, "controlnet_block_every_n": 2}
    return _cosmos25(Cosmos2_5_TransferPipeline, config, controlnet=controlnet)


def _image(pipe: Any, arguments: Inputs) -> torch.Tensor:
    """Latents of a pipeline that makes images, as those of a video."""
    return pipe(**arguments).images[:, :, None]


def _unguarded(pipeline: Any) -> dict[str, Callable[..., Any]]:
    """The pipeline's own `__init__`, but that a stand-in takes the place of the guardrail that it would load."""
    made = pipeline.__init__

    @functools.wraps(made)
    def make(pipe: Any, *arguments: Any, **parts: Any) -> None:
        made(pipe, *arguments, **{**parts, "safety_checker": Unguarded()})

    return {"__init__": make}


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    """What the pipelines give the transformer: a mask of the known frames where it takes one."""
    _, _, frames, height, width = latents
    width_of_text = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    text: Any = noise.text(512, width_of_text)
    pixels = torch.zeros(1, 1, 8 * height, 8 * width, dtype=noise.dtype, device=noise.device)
    made: Inputs = {"encoder_hidden_states": text, "padding_mask": pixels}
    if config.extra_pos_embed_type == "learnable":
        made["fps"] = 30  # Cosmos 1
    if config.in_channels == 17:
        mask = torch.zeros(1, 1, frames, height, width, dtype=noise.dtype, device=noise.device)
        mask[:, :, 0] = 1
        made["condition_mask"] = mask
        if config.extra_pos_embed_type is None:
            made["timestep"] = noise.timestep(1, 1, frames, 1, 1)
    if config.img_context_dim_in:
        context = noise(1, noise.tokens(config.img_context_num_tokens), config.img_context_dim_in)
        made["encoder_hidden_states"] = (text, context)
        tokens, channels = frames * height * width // 4, config.num_attention_heads * config.attention_head_dim
        blocks = -(-config.num_layers // config.controlnet_block_every_n)
        made["block_controlnet_hidden_states"] = [noise(1, tokens, channels) for _ in range(blocks)]
    return made


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    toy = {name: TRANSFORMER[name] for name in ("num_attention_heads", "attention_head_dim", "mlp_ratio")}
    toy |= {"num_layers": 1, "text_embed_dim": TEXT_DIM, "adaln_lora_dim": 4}
    if "use_crossattn_projection" in config:
        toy |= PROJECTION
    return {**toy, "img_context_dim_in": 8, "img_context_dim_out": 32} if "img_context_dim_in" in config else toy


def _published(checkpoint: str, size: str, rope_scale: tuple[float, float, float], **about: Any) -> Published:
    """Of Cosmos 2 and 2.5, of 2B or 14B parameters, for 93 frames; `about` are other fields of its row."""
    layers, heads = {"2B": (28, 16), "14B": (36, 40)}[size]
    config = {
        "in_channels": 17,
        "num_attention_heads": heads,
        "num_layers": layers,
        "text_embed_dim": 1024,
        "rope_scale": rope_scale,
        "extra_pos_embed_type": None,
        **about.pop("config", {}),
    }
    row = {"latents": (1, 16, 24, 88, 160), "grid": (24, 44, 80), "vae": _WAN_VAE, **about}
    return Published(checkpoint, "CosmosTransformer3DModel", config, layers=layers, heads=heads, head_dim=128, **row)


def _published1(checkpoint: str, size: str, in_channels: int, toy: bool = False) -> Published:
    """Of Cosmos 1, of 7B or 14B parameters, for 121 frames."""
    layers, heads, scale = {"7B": (28, 32, (2.0, 1.0, 1.0)), "14B": (36, 40, (2.0, 2.0, 2.0))}[size]
    config = {
        "in_channels": in_channels,
        "num_attention_heads": heads,
        "num_layers": layers,
        "text_embed_dim": 1024,
        "rope_scale": scale,
        "extra_pos_embed_type": "learnable",
    }
    return Published(
        checkpoint,
        "CosmosTransformer3DModel",
        config,
        latents=(1, 16, 16, 88, 160),
        layers=layers,
        heads=heads,
        head_dim=128,
        grid=(16, 44, 80),
        vae={"spatial_compression_ratio": 8, "temporal_compression_ratio": 8},
        toy=toy,
    )


_WAN_VAE = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}
_PROJECTED = {
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
    "encoder_hidden_states_channels": 1024,
}
_TRANSFER = {
    **_PROJECTED,
    "controlnet_block_every_n": 7,
    "img_context_dim_in": 1152,
    "img_context_dim_out": 2048,
    "img_context_num_tokens": 256,
}
_RUN: Inputs = {**GUIDED, **SMALL_TEXT}
_WITH_IMAGE: Inputs = {**_RUN, "image": IMAGE}
_VIDEO: Inputs = {"image": None, "video": [IMAGE] * 5}

TESTS = FamilyTests(
    family=Cosmos,
    cases={
        "cosmos": Case(tiny_cosmos, _RUN, (*SIZES, {**TWO_PROMPTS, "num_videos_per_prompt": 2}), one_each=True),
        "cosmos-i2v": Case(tiny_cosmos_i2v, _WITH_IMAGE, (_VIDEO, {**TWO_PROMPTS, "height": 96})),
        "cosmos2": Case(tiny_cosmos2, _WITH_IMAGE, (_VIDEO, {**TWO_PROMPTS, "width": 96})),
        "cosmos2-t2i": Case(
            tiny_cosmos2_t2i,
            {**_RUN, "num_frames": None, "height": 256, "width": 256},
            ({"width": 192}, {**TWO_PROMPTS, "num_images_per_prompt": 2, "height": 128}),
            call=_image,
        ),
        "cosmos2.5": Case(tiny_cosmos25, _RUN, (SIZES[1], {**TWO_PROMPTS, "image": IMAGE}, _VIDEO)),
        "cosmos2.5-transfer": Case(
            tiny_cosmos25_transfer,
            {
                **_RUN,
                "controls": [IMAGE] * 9,
                "num_frames_per_chunk": 9,
                "height": 96,
                "width": 96,
                "num_inference_steps": 3,
            },
            ({**TWO_PROMPTS, "width": 64},),
        ),
    },
    networks={"CosmosTransformer3DModel": Network(_inputs, _toy)},
    published=(
        _published1("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", "7B", 16, toy=True),
        _published1("nvidia/Cosmos-1.0-Diffusion-7B-Video2World", "7B", 17, toy=True),
        _published1("nvidia/Cosmos-1.0-Diffusion-14B-Text2World", "14B", 16),
        _published1("nvidia/Cosmos-1.0-Diffusion-14B-Video2World", "14B", 17),
        _published("nvidia/Cosmos-Predict2-2B-Video2World", "2B", (1.0, 3.0, 3.0), toy=True),
        _published("nvidia/Cosmos-Predict2-14B-Video2World", "14B", (20 / 24, 2.0, 2.0)),
        _published(
            "nvidia/Cosmos-Predict2-2B-Text2Image",
            "2B",
            (1.0, 4.0, 4.0),
            config={"in_channels": 16},
            latents=(1, 16, 1, 96, 170),
            grid=(1, 48, 85),
        ),
        _published("nvidia/Cosmos-Predict2.5-2B", "2B", (1.0, 3.0, 3.0), config=_PROJECTED, toy=True),
        _published("nvidia/Cosmos-Predict2.5-14B", "14B", (1.0, 3.0, 3.0), config=_PROJECTED),
        _published("nvidia/Cosmos-Transfer2.5-2B", "2B", (1.0, 3.0, 3.0), config=_TRANSFER, toy=True),
    ),
    saved={
        "cosmos": SavedCase(tiny_cosmos, size=128, frames=9, stand_ins=_unguarded(CosmosTextToWorldPipeline)),
        "cosmos2": SavedCase(tiny_cosmos2, size=128, frames=9, stand_ins=_unguarded(Cosmos2VideoToWorldPipeline)),
        "cosmos2.5": SavedCase(tiny_cosmos25, size=128, frames=9, stand_ins=_unguarded(Cosmos2_5_PredictBasePipeline)),
    },
    has_set_attn_processor=False,
)
