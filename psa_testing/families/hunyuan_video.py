"""HunyuanVideo: tiny random pipelines with two dual-stream and two single-stream blocks, 2 heads of 16, and the
published transformers.

Their configurations are those of `scripts/convert_hunyuan_video_to_diffusers.py` of diffusers (58eb52c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from psa_diffusers.families.hunyuan_video import HunyuanVideo
from psa_testing.cases import SIZES, TWO_PROMPTS, UNEVEN, Case, JointText, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_pipelines import tiny_image, tiny_tokenizer

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),  # sums to the head dimension
}


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    """4 x 8 x 8 compression, 4 latent channels."""
    return AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()


def _llama_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=16,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=1000,
    )


def parts(transformer: torch.nn.Module) -> dict[str, Any]:
    """The components of a pipeline."""
    clip = CLIPTextConfig(
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=1000,
        projection_dim=32,
    )
    torch.manual_seed(0)
    return {
        "text_encoder": LlamaModel(_llama_config(4)).eval(),
        "tokenizer": tiny_tokenizer(),
        "transformer": transformer.eval(),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": CLIPTextModel(clip).eval(),
        "tokenizer_2": tiny_tokenizer(77),
    }


def tiny_hunyuan_video(**config: Any) -> HunyuanVideoPipeline:
    """Text to video; `true_cfg_scale` makes it run both guidance branches. `config` overrides the transformer's."""
    torch.manual_seed(0)
    return HunyuanVideoPipeline(**parts(HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **config})))


def tiny_hunyuan_video_i2v(condition: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """Image to video; `condition` is how the model reads its image: `token_replace` or `latent_concat`."""
    torch.manual_seed(0)
    channels = 4 if condition == "token_replace" else 2 * 4 + 1
    transformer = HunyuanVideoTransformer3DModel(
        **{**TRANSFORMER, "in_channels": channels, "image_condition_type": condition}
    )
    components = parts(transformer)
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=224,
    )
    llava = LlavaConfig(vision_config=vision, text_config=_llama_config(4), pad_token_id=100, image_token_index=101)
    torch.manual_seed(0)
    components["text_encoder"] = LlavaForConditionalGeneration(llava).eval()
    return HunyuanVideoImageToVideoPipeline(**components, image_processor=CLIPImageProcessor(crop_size=224, size=224))


def inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    """What its pipelines give the transformer."""
    made = noise.padded_text(256, config.text_embed_dim)
    made["pooled_projections"] = noise(1, config.pooled_projection_dim)
    if config.guidance_embeds:
        made["guidance"] = torch.tensor([6000.0], dtype=noise.dtype, device=noise.device)
    return made


def toy(config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a toy of the transformer."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "rope_axes_dim": (4, 6, 6),
    }


ONE_BLOCK = {"num_layers": 1, "num_single_layers": 1}
TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 32}
GUIDED = {"negative_prompt": "bad", "true_cfg_scale": 3.0, "guidance_scale": 1.0, **TEMPLATE}
_WITH_IMAGE = {
    **GUIDED,
    "image": tiny_image(128, 128),
    "prompt_template": {
        "template": "{}",
        "crop_start": 0,
        "image_emb_len": 49,
        "image_emb_start": 5,
        "image_emb_end": 54,
    },
    "max_sequence_length": 64,
    "num_inference_steps": 3,
}
T2V = Published(
    "hunyuanvideo-community/HunyuanVideo",
    "HunyuanVideoTransformer3DModel",
    {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 20,
        "num_single_layers": 40,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": (16, 56, 56),
    },
    latents=(1, 16, 33, 90, 160),
    layers=60,
    heads=24,
    head_dim=128,
    grid=(33, 45, 80),
    text=256,
    vae={"spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    toy=True,
)

TESTS = FamilyTests(
    family=HunyuanVideo,
    cases={
        "hunyuan-video": Case(
            tiny_hunyuan_video,
            GUIDED,
            (*SIZES, TWO_PROMPTS, {"num_videos_per_prompt": 2}),
            one_each=True,
            fuses=True,
        ),
        "hunyuan-video-distilled": Case(
            tiny_hunyuan_video,
            {"guidance_scale": 6.0, **TEMPLATE},
            ({"prompt": ["a cat", "a dog, running"]}, {"num_frames": 1}),
            text=JointText(32, (6, 15)),
        ),
        "hunyuan-video-i2v": Case(
            tiny_hunyuan_video_i2v,
            _WITH_IMAGE,
            ({"true_cfg_scale": 1.0, "height": 96, "width": 160},),
        ),
        "hunyuan-video-i2v-concat": Case(lambda: tiny_hunyuan_video_i2v("latent_concat"), _WITH_IMAGE),
    },
    networks={"HunyuanVideoTransformer3DModel": Network(inputs, toy, one_block=ONE_BLOCK, kinds=2)},
    published=(
        T2V,
        replace(
            T2V,
            checkpoint="hunyuanvideo-community/HunyuanVideo-I2V",
            config={**T2V.config, "image_condition_type": "token_replace"},
            toy=False,
        ),
        replace(
            T2V,
            checkpoint="hunyuanvideo-community/HunyuanVideo-I2V-33ch",
            config={
                **T2V.config,
                "in_channels": 33,
                "guidance_embeds": False,
                "image_condition_type": "latent_concat",
            },
            latents=(1, 33, 33, 90, 160),
        ),
    ),
    parallel={
        "hunyuan-video": ParallelCase(
            Case(lambda: tiny_hunyuan_video(num_attention_heads=4), GUIDED),
            (Ranks(2, inputs=TWO_PROMPTS), Ranks(4, "patch", UNEVEN, any_length=True)),
        ),
    },
    saved={"hunyuan-video": SavedCase(tiny_hunyuan_video, size=64, frames=9)},
    masks_padding=True,
)
