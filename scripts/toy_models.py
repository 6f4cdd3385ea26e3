"""What makes a toy of each published transformer: 192 video tokens, two narrow heads, 16 text tokens."""

from __future__ import annotations

from typing import Any

TEXT = 16
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 32,
}
_WAN_IMAGE = {"image_dim": 8, "added_kv_proj_dim": 64}
_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": {**_WAN, "vace_layers": [0]},
    "WanAnimateTransformer3DModel": {
        **_WAN,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
    },
    "SkyReelsV2Transformer3DModel": _WAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": {**_HUNYUAN, "image_proj_dim": 32},
    "HunyuanVideo15Transformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 32,
        "text_embed_2_dim": 32,
        "image_embed_dim": 12,
        "rope_axes_dim": (4, 6, 6),
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 2,
        "time_embed_dim": 8,
        "text_embed_dim": 32,
        "max_text_seq_length": TEXT,
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 9,
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "cross_attention_dim": 32,
        "caption_channels": 32,
    },
    "MochiTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "pooled_projection_dim": 16,
        "text_embed_dim": 32,
        "time_embed_dim": 4,
        "max_sequence_length": TEXT,
    },
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "cross_attention_dim": 24,
        "caption_channels": 32,
        "sample_height": 16,
        "sample_width": 16,
        "sample_frames": 3,
    },
}


def toy_config(model: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a toy of a published transformer."""
    toy = {**config, **_CONFIGS[model]}
    if "added_kv_proj_dim" in config:
        toy |= _WAN_IMAGE
    if "ofs_embed_dim" in config:
        toy["ofs_embed_dim"] = toy["time_embed_dim"]
    return toy


def toy_latents(model: str, config: dict[str, Any], latents: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of its latents: 3 x 8 x 8 tokens."""
    if len(latents) == 3:
        return (1, 192, latents[2])
    if model.startswith("CogVideoX"):
        return (1, 3 * config.get("patch_size_t", 1), latents[2], 16, 16)
    size = 8 if model.startswith("HunyuanVideo15") else 16
    return (1, latents[1], 3, size, size)


def toy_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """What a toy is told about its size, where the published one is told it too."""
    return {"num_frames": 3, "height": 8, "width": 8} if sizes else {}
