"""Tiny random Wan pipelines on the CPU, made entirely in code: no hub, no files, about 0.1 s a run.

The weights are random, so the pictures are noise; what is real is diffusers' own code around them. All of them survive
`save_pretrained` / `from_pretrained`.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_DIM = 32
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"-_()[]{}<>|/\\\n"
SMALL_RUN = {
    "prompt": "dance monkey",
    "negative_prompt": "bad",
    "guidance_scale": 6.0,
    "num_inference_steps": 4,
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "max_sequence_length": 16,
    "output_type": "pt",
}


def tiny_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """One token a character; pad 0, end 1, unknown 3, as in T5."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *dict.fromkeys(ALPHABET)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=max_length,
        padding_side="right",
    )


def tiny_text_encoder() -> UMT5EncoderModel:
    """Two UMT5 layers of width `TEXT_DIM`, in eval mode (T5 has dropout)."""
    config = UMT5Config(
        vocab_size=128,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).eval()


def tiny_transformer(num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> WanTransformer3DModel:
    """A Wan transformer; the same arguments give the same weights. `config` overrides any other model setting."""
    torch.manual_seed(0)
    settings = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**settings, **config}).eval()


def tiny_vae() -> AutoencoderKLWan:
    """Wan's VAE (4 x 8 x 8 compression, 16 latent channels) with the fewest filters and blocks it accepts."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=0, temperal_downsample=[False, True, True]
    ).eval()


def _parts(two_stage: bool, **config) -> dict:
    if two_stage:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    vae = tiny_vae()
    torch.manual_seed(0)
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": vae,
        "scheduler": scheduler,
        "transformer": tiny_transformer(**config),
        "transformer_2": tiny_transformer(**config) if two_stage else None,
        "boundary_ratio": 0.875 if two_stage else None,
    }


def tiny_wan(two_stage: bool = False, num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> WanPipeline:
    """Text to video: Wan 2.1 (flow-match Euler, shift 7), or with `two_stage` Wan 2.2 A14B's two experts (UniPC)."""
    return WanPipeline(**_parts(two_stage, num_layers=num_layers, heads=heads, head_dim=head_dim, **config))


def tiny_wan_expanded(num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> WanPipeline:
    """Text to video with one timestep a token, as Wan 2.2 TI2V-5B (`expand_timesteps`)."""
    parts = _parts(False, num_layers=num_layers, heads=heads, head_dim=head_dim, **config)
    return WanPipeline(**parts, expand_timesteps=True)


def tiny_wan_i2v(
    two_stage: bool = False, num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config
) -> WanImageToVideoPipeline:
    """Image to video without an image encoder, as Wan 2.2: 16 latent + 16 image + 4 mask channels go in."""
    config = {"in_channels": 36, **config}
    return WanImageToVideoPipeline(**_parts(two_stage, num_layers=num_layers, heads=heads, head_dim=head_dim, **config))


def tiny_wan21_i2v(num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> WanImageToVideoPipeline:
    """Image to video with an image encoder, as Wan 2.1: its cross-attention reads image and (512) text tokens apart."""
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=4,
            projection_dim=4,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=4,
            intermediate_size=16,
            patch_size=1,
        )
    ).eval()
    settings = {"in_channels": 36, "image_dim": 4, "added_kv_proj_dim": heads * head_dim, **config}
    parts = _parts(False, num_layers=num_layers, heads=heads, head_dim=head_dim, **settings)
    processor = CLIPImageProcessor(crop_size=4, size=4)
    return WanImageToVideoPipeline(**parts, image_encoder=image_encoder, image_processor=processor)


def tiny_wan_v2v(num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> WanVideoToVideoPipeline:
    """Video to video (`video=[PIL...]`, `strength=`), which drops the first timesteps of the schedule."""
    parts = _parts(True, num_layers=num_layers, heads=heads, head_dim=head_dim, **config)
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    return WanVideoToVideoPipeline(**{name: parts[name] for name in names})


def tiny_lucy_edit(num_layers: int = 4, heads: int = 2, head_dim: int = 32, **config) -> LucyEditPipeline:
    """Editing of a video (`video=[PIL...]`), whose latents go in beside the noise, with one timestep a token."""
    config = {"in_channels": 32, **config}
    parts = _parts(False, num_layers=num_layers, heads=heads, head_dim=head_dim, **config)
    return LucyEditPipeline(**parts, expand_timesteps=True)


def tiny_image(width: int = 64, height: int = 64) -> Image.Image:
    """A colour ramp, as a condition for image to video."""
    across = torch.linspace(0, 255, width).expand(height, width)
    down = torch.linspace(0, 255, height)[:, None].expand(height, width)
    pixels = torch.stack([across, down, torch.full_like(across, 96)], dim=-1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def run(pipe, seed: int = 0, **overrides) -> torch.Tensor:
    """Runs `pipe` with `SMALL_RUN` and `overrides`; gives the frames, [1, 9, 3, 64, 64] in [0, 1] unless overridden."""
    pipe.set_progress_bar_config(disable=True)
    arguments = {**SMALL_RUN, "generator": torch.Generator().manual_seed(seed), **overrides}
    return pipe(**arguments).frames
