"""The transformers of published checkpoints, as their own configuration says, and the video that each makes by default.

Sources, by the letter in each row:

- W: `scripts/convert_wan_to_diffusers.py` of diffusers (58eb52c), from which the checkpoints were made;
- S: `scripts/convert_skyreelsv2_to_diffusers.py`, likewise;
- H: `scripts/convert_hunyuan_video_to_diffusers.py`, likewise;
- V: `scripts/convert_hunyuan_video1_5_to_diffusers.py`: the class's defaults but for two keys;
- C: `scripts/convert_cogvideox_to_diffusers.py`: the class's defaults but for the keys here;
- L: `scripts/convert_ltx_to_diffusers.py`, which for 0.9 equals Lightricks/LTX-Video's transformer/config.json;
- M: `scripts/convert_mochi_to_diffusers.py` (48 blocks) and the class's defaults;
- A: transformer/config.json of rhymes-ai/Allegro;
- F: `load_packed_model` of kohya-ss/musubi-tuner (src/musubi_tuner/frame_pack/hunyuan_video_packed.py, 0382db2), which
  writes out the configuration that it loads the published weights into; equal to the class's defaults but for two keys.

Sizes and text lengths are the defaults of the diffusers pipelines and of the model cards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """A checkpoint, and what a family must make of it.

    Attributes:
        checkpoint: its repository.
        model: class of its transformer.
        config: arguments of that class that differ from its defaults, or matter here.
        latents: shape `[1, ...]` of the hidden states that its pipeline gives for the default video.
        layers, heads, head_dim: of its video self-attention.
        grid: video tokens along frames, height and width for the default video.
        text: tokens of joint attention with them, padding included.
        inputs: what else its pipeline tells the transformer about the size.
    """

    checkpoint: str
    model: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int, int]
    text: int = 0
    inputs: dict[str, int] = field(default_factory=dict)


def wan(checkpoint: str, latents: tuple[int, ...], grid: tuple[int, int, int], size: str, **config: Any) -> Published:
    """A transformer of Wan's architecture (W or S), of 1.3B, 5B or 14B parameters."""
    layers, heads, ffn = {"1.3B": (30, 12, 8960), "5B": (30, 24, 14336), "14B": (40, 40, 13824)}[size]
    model = config.pop("model", "WanTransformer3DModel")
    base = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "in_channels": latents[1],
        "out_channels": 16,
    }
    layers += len(config.get("vace_layers", ()))
    return Published(checkpoint, model, {**base, **config}, latents, layers, heads, 128, grid)


WAN_480P, WAN_720P = (21, 30, 52), (21, 45, 80)
IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
VACE = {"model": "WanVACETransformer3DModel", "vace_in_channels": 96}
SKYREELS = {"model": "SkyReelsV2Transformer3DModel"}
ANIMATE = {
    "model": "WanAnimateTransformer3DModel",
    "motion_encoder_size": 512,
    "motion_style_dim": 512,
    "motion_dim": 20,
    "motion_encoder_dim": 512,
    "face_encoder_hidden_dim": 1024,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 5,
}
HUNYUAN = {
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
}
HUNYUAN_I2V_33 = {
    **HUNYUAN,
    "in_channels": 33,
    "guidance_embeds": False,
    "image_condition_type": "latent_concat",
}
HUNYUAN_I2V = {**HUNYUAN, "image_condition_type": "token_replace"}
FRAMEPACK = {
    **HUNYUAN,
    "has_image_proj": True,
    "image_proj_dim": 1152,
    "has_clean_x_embedder": True,
}
COGVIDEOX_1_0 = {"patch_size": 2, "sample_height": 60, "sample_width": 90, "sample_frames": 49}
COGVIDEOX_2B = {**COGVIDEOX_1_0, "num_layers": 30, "num_attention_heads": 30}
COGVIDEOX_5B = {
    **COGVIDEOX_1_0,
    "num_layers": 42,
    "num_attention_heads": 48,
    "use_rotary_positional_embeddings": True,
}
COGVIDEOX_5B_I2V = {**COGVIDEOX_5B, "in_channels": 32, "use_learned_positional_embeddings": True}
COGVIDEOX_1_5 = {
    **COGVIDEOX_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}
COGVIDEOX_1_5_I2V = {**COGVIDEOX_1_5, "in_channels": 32, "ofs_embed_dim": 512}
LTX = {
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
}
LTX_13B = {
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "num_layers": 48,
}
ALLEGRO = {
    "num_attention_heads": 24,
    "attention_head_dim": 96,
    "num_layers": 32,
    "cross_attention_dim": 2304,
    "sample_height": 90,
    "sample_width": 160,
    "sample_frames": 22,
}
# Text of HunyuanVideo 1.5: 1000 tokens, 256 of glyphs and 729 of an image, which are padding in text to video.
HUNYUAN_1_5_TEXT = 1000 + 256 + 729
# Text of Framepack: 729 tokens of the image, and up to 256 of the prompt.
FRAMEPACK_TEXT = 729 + 256

HV, HV15 = "HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"
COG, LTXV = "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel"
LTX_SIZE = {"num_frames": 21, "height": 15, "width": 22}

PUBLISHED: tuple[Published, ...] = (
    wan("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (1, 16, 21, 60, 104), WAN_480P, "1.3B"),
    wan("Wan-AI/Wan2.1-T2V-14B-Diffusers", (1, 16, 21, 90, 160), WAN_720P, "14B"),
    wan("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", (1, 36, 21, 60, 104), WAN_480P, "14B", **IMAGE),
    wan("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", (1, 36, 21, 90, 160), WAN_720P, "14B", **IMAGE),
    wan("Wan-AI/Wan2.2-T2V-A14B-Diffusers", (1, 16, 21, 90, 160), WAN_720P, "14B"),
    wan("Wan-AI/Wan2.2-I2V-A14B-Diffusers", (1, 36, 21, 60, 104), WAN_480P, "14B"),
    wan("Wan-AI/Wan2.2-TI2V-5B-Diffusers", (1, 48, 31, 44, 80), (31, 22, 40), "5B", out_channels=48),
    wan(
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers",
        (1, 16, 21, 60, 104),
        WAN_480P,
        "1.3B",
        **VACE,
        vace_layers=list(range(0, 30, 2)),
    ),
    wan(
        "Wan-AI/Wan2.1-VACE-14B-diffusers",
        (1, 16, 21, 90, 160),
        WAN_720P,
        "14B",
        **VACE,
        vace_layers=list(range(0, 40, 5)),
    ),
    # A segment of 77 frames, and the reference frame before it.
    wan("Wan-AI/Wan2.2-Animate-14B-Diffusers", (1, 36, 21, 90, 160), WAN_720P, "14B", **IMAGE, **ANIMATE),
    wan("Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", (1, 16, 25, 68, 120), (25, 34, 60), "14B", **SKYREELS),
    wan("Skywork/SkyReels-V2-T2V-14B-720P-Diffusers", (1, 16, 31, 90, 160), (31, 45, 80), "14B", **SKYREELS),
    wan("Skywork/SkyReels-V2-I2V-14B-540P-Diffusers", (1, 36, 25, 68, 120), (25, 34, 60), "14B", **IMAGE, **SKYREELS),
    wan(
        "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers",
        (1, 16, 25, 68, 120),
        (25, 34, 60),
        "1.3B",
        inject_sample_info=True,
        **SKYREELS,
    ),
    Published("hunyuanvideo-community/HunyuanVideo", HV, HUNYUAN, (1, 16, 33, 90, 160), 60, 24, 128, (33, 45, 80), 256),
    Published(
        "hunyuanvideo-community/HunyuanVideo-I2V", HV, HUNYUAN_I2V, (1, 16, 33, 90, 160), 60, 24, 128, (33, 45, 80), 256
    ),
    Published(
        "hunyuanvideo-community/HunyuanVideo-I2V-33ch",
        HV,
        HUNYUAN_I2V_33,
        (1, 33, 33, 90, 160),
        60,
        24,
        128,
        (33, 45, 80),
        256,
    ),
    # A section of 9 latent frames of 832 x 480 pixels; the tokens of earlier frames before it are not in the grid.
    Published(
        "lllyasviel/FramePackI2V_HY",
        "HunyuanVideoFramepackTransformer3DModel",
        FRAMEPACK,
        (1, 16, 9, 104, 60),
        60,
        24,
        128,
        (9, 52, 30),
        FRAMEPACK_TEXT,
    ),
    Published(
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        HV15,
        {"target_size": 640, "task_type": "t2v"},
        (1, 65, 31, 30, 53),
        54,
        16,
        128,
        (31, 30, 53),
        HUNYUAN_1_5_TEXT,
    ),
    Published(
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
        HV15,
        {"target_size": 960, "task_type": "t2v"},
        (1, 65, 31, 45, 80),
        54,
        16,
        128,
        (31, 45, 80),
        HUNYUAN_1_5_TEXT,
    ),
    Published("zai-org/CogVideoX-2b", COG, COGVIDEOX_2B, (1, 13, 16, 60, 90), 30, 30, 64, (13, 30, 45), 226),
    Published("zai-org/CogVideoX-5b", COG, COGVIDEOX_5B, (1, 13, 16, 60, 90), 42, 48, 64, (13, 30, 45), 226),
    Published("zai-org/CogVideoX-5b-I2V", COG, COGVIDEOX_5B_I2V, (1, 13, 32, 60, 90), 42, 48, 64, (13, 30, 45), 226),
    # 81 frames are 21 latent frames, to which the pipeline adds one: patches take two.
    Published("zai-org/CogVideoX1.5-5B", COG, COGVIDEOX_1_5, (1, 22, 16, 96, 170), 42, 48, 64, (11, 48, 85), 226),
    Published(
        "zai-org/CogVideoX1.5-5B-I2V", COG, COGVIDEOX_1_5_I2V, (1, 22, 32, 96, 170), 42, 48, 64, (11, 48, 85), 226
    ),
    Published("Lightricks/LTX-Video", LTXV, LTX, (1, 6930, 128), 28, 32, 64, (21, 15, 22), inputs=LTX_SIZE),
    Published(
        "Lightricks/LTX-Video-0.9.7-dev", LTXV, LTX_13B, (1, 6930, 128), 48, 32, 128, (21, 15, 22), inputs=LTX_SIZE
    ),
    Published(
        "genmo/mochi-1-preview", "MochiTransformer3DModel", {}, (1, 12, 15, 60, 106), 48, 24, 128, (15, 30, 53), 256
    ),
    Published("rhymes-ai/Allegro", "AllegroTransformer3DModel", ALLEGRO, (1, 4, 22, 90, 160), 32, 24, 96, (22, 45, 80)),
)
