"""Tiny random pipelines of Wan's relatives: VACE, Animate and SkyReels V2; 2 or 3 layers, 2 heads of 16."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from psa_testing.tiny_pipelines import TEXT_DIM, tiny_text_encoder, tiny_tokenizer, tiny_vae

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


def _parts(transformer: torch.nn.Module) -> dict:
    vae = tiny_vae()
    torch.manual_seed(0)
    return {
        "transformer": transformer.eval(),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": tiny_text_encoder(),
        "tokenizer": tiny_tokenizer(),
    }


def tiny_wan_vace() -> WanVACEPipeline:
    """Wan with two control blocks, which feed blocks 0 and 2."""
    torch.manual_seed(0)
    config = {**TRANSFORMER, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 96}
    return WanVACEPipeline(**_parts(WanVACETransformer3DModel(**config)))


def tiny_wan_animate() -> WanAnimatePipeline:
    """Wan that follows a pose and a face video, segment by segment; a reference frame precedes the segment's frames."""
    torch.manual_seed(0)
    transformer = WanAnimateTransformer3DModel(
        **{**TRANSFORMER, "in_channels": 36},
        latent_channels=16,
        image_dim=4,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    parts = _parts(transformer)
    return WanAnimatePipeline(
        **parts,
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=4, size=4),
    )


def _skyreels_parts() -> dict:
    torch.manual_seed(0)
    parts = _parts(SkyReelsV2Transformer3DModel(**TRANSFORMER))
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", flow_shift=8.0, use_flow_sigmas=True
    )
    return parts


def tiny_skyreels_v2() -> SkyReelsV2Pipeline:
    """Text to video."""
    return SkyReelsV2Pipeline(**_skyreels_parts())


def tiny_skyreels_v2_forcing() -> SkyReelsV2DiffusionForcingPipeline:
    """Diffusion forcing: every frame has a timestep and a scheduler of its own."""
    return SkyReelsV2DiffusionForcingPipeline(**_skyreels_parts())
