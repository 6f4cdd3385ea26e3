"""Tiny random HunyuanVideo pipelines: two dual-stream and two single-stream blocks, 2 heads of 16."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
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
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from psa_testing.tiny_pipelines import tiny_tokenizer

TRANSFORMER = {
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


def _vae() -> AutoencoderKLHunyuanVideo:
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


def _parts(transformer: torch.nn.Module) -> dict:
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
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder_2": CLIPTextModel(clip).eval(),
        "tokenizer_2": tiny_tokenizer(77),
    }


def tiny_hunyuan_video(**config) -> HunyuanVideoPipeline:
    """Text to video; `true_cfg_scale` makes it run both guidance branches. `config` overrides the transformer's."""
    torch.manual_seed(0)
    return HunyuanVideoPipeline(**_parts(HunyuanVideoTransformer3DModel(**{**TRANSFORMER, **config})))


def tiny_hunyuan_video_i2v(condition: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """Image to video; `condition` is how the model reads its image: `token_replace` or `latent_concat`."""
    torch.manual_seed(0)
    channels = 4 if condition == "token_replace" else 2 * 4 + 1
    transformer = HunyuanVideoTransformer3DModel(
        **{**TRANSFORMER, "in_channels": channels, "image_condition_type": condition}
    )
    parts = _parts(transformer)
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
    parts["text_encoder"] = LlavaForConditionalGeneration(llava).eval()
    return HunyuanVideoImageToVideoPipeline(**parts, image_processor=CLIPImageProcessor(crop_size=224, size=224))


def tiny_framepack() -> HunyuanVideoFramepackPipeline:
    """Next-section prediction: every section of the video is a denoising run of its own, after earlier frames."""
    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        **TRANSFORMER, image_condition_type=None, has_image_proj=True, image_proj_dim=32, has_clean_x_embedder=True
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=2, image_size=30, patch_size=15
    )
    return HunyuanVideoFramepackPipeline(
        **_parts(transformer),
        image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 30, "width": 30}),
    )
