"""What the pipelines of diffusers give their transformers by default, as noise: one function a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from toy_models import TEXT

Inputs = dict[str, Any]
TIMESTEP = 20
IMAGE_TOKENS = 257  # of CLIP's image encoder
FRAMEPACK_HISTORY = (1, 2, 16)  # frames at full, half and quarter scale


@dataclass(frozen=True)
class Noise:
    """Random inputs of one kind and place.

    Attributes:
        padding: share of the text tokens that are padding.
        tiny: whether texts are a toy's.
    """

    dtype: torch.dtype
    device: str
    padding: float
    tiny: bool

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def tokens(self, published: int) -> int:
        return TEXT if self.tiny else published

    def text(self, tokens: int, width: int) -> torch.Tensor:
        """Embeddings `[1, T, width]`."""
        return self(1, self.tokens(tokens), width)

    def padded_text(self, tokens: int, width: int, suffix: str = "") -> Inputs:
        """Embeddings, and a mask `[1, T]` that is 0 at the last ones."""
        embeds = self.text(tokens, width)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
        mask[:, mask.shape[1] - int(self.padding * mask.shape[1]) :] = 0
        return {f"encoder_hidden_states{suffix}": embeds, f"encoder_attention_mask{suffix}": mask}

    def timestep(self, *shape: int) -> torch.Tensor:
        return torch.full(shape or (1,), TIMESTEP, device=self.device)


def noise_inputs(
    transformer: torch.nn.Module,
    latents: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    padding: float = 0.0,
    tiny: bool = False,
) -> Inputs:
    """Arguments of a transformer's forward, by name, for latents of a shape."""
    make = _INPUTS[type(transformer).__name__]
    noise = Noise(dtype, device, padding, tiny)
    common = {"hidden_states": noise(*latents), "timestep": noise.timestep()}
    return {**common, **make(transformer.config, latents, noise)}


def _wan(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    inputs: Inputs = {"encoder_hidden_states": noise.text(512, config.text_dim)}
    if config.added_kv_proj_dim:
        inputs["encoder_hidden_states_image"] = noise(1, IMAGE_TOKENS, config.image_dim)
    if config.in_channels == 48:  # the one model whose pipeline gives every token a timestep
        _, frames, height, width = latents[1:]
        inputs["timestep"] = noise.timestep(1, frames * (height // 2) * (width // 2))
    return inputs


def _vace(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    control = noise(1, config.vace_in_channels, *latents[2:])
    return {**_wan(config, latents, noise), "control_hidden_states": control}


def _animate(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    frames, size = latents[2] - 1, config.motion_encoder_size  # without that of the reference image
    return {
        **_wan(config, latents, noise),
        "pose_hidden_states": noise(1, config.latent_channels, frames, *latents[3:]),
        "face_pixel_values": noise(1, 3, 4 * frames - 3, size, size).clamp(-1, 1),
    }


def _skyreels(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    inputs = _wan(config, latents, noise)
    if config.inject_sample_info:  # diffusion forcing: a timestep a frame, and whether it is 24 frames a second
        inputs |= {"timestep": noise.timestep(1, latents[2]), "enable_diffusion_forcing": True, "fps": [1]}
    return inputs


def _hunyuan(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    inputs = noise.padded_text(256, config.text_embed_dim)
    inputs["pooled_projections"] = noise(1, config.pooled_projection_dim)
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([6000.0], dtype=noise.dtype, device=noise.device)
    return inputs


def _framepack(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    _, channels, frames, height, width = latents
    prefix, own, *history = torch.arange(1 + frames + sum(FRAMEPACK_HISTORY)).split([1, frames, *FRAMEPACK_HISTORY])
    return {
        **_hunyuan(config, latents, noise),
        "image_embeds": noise(1, noise.tokens(729), config.image_proj_dim),
        "indices_latents": own,
        "latents_clean": noise(1, channels, 1 + FRAMEPACK_HISTORY[0], height, width),
        "indices_latents_clean": torch.cat([prefix, history[0]]),
        "latents_history_2x": noise(1, channels, FRAMEPACK_HISTORY[1], height, width),
        "indices_latents_history_2x": history[1],
        "latents_history_4x": noise(1, channels, FRAMEPACK_HISTORY[2], height, width),
        "indices_latents_history_4x": history[2],
    }


def _hunyuan15(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    # Without an image its embeddings are zero, and the model masks them.
    image = torch.zeros(1, noise.tokens(729), config.image_embed_dim, dtype=noise.dtype, device=noise.device)
    texts = noise.padded_text(1000, config.text_embed_dim) | noise.padded_text(256, config.text_embed_2_dim, "_2")
    # Its pipeline gives masks and timesteps of the embeddings' type.
    masks = {name: mask.to(noise.dtype) for name, mask in texts.items() if "mask" in name}
    return {**texts, **masks, "timestep": noise.timestep().to(noise.dtype), "image_embeds": image}


def _cogvideox(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    inputs: Inputs = {"encoder_hidden_states": noise.text(config.max_text_seq_length, config.text_embed_dim)}
    patch, patch_t = config.patch_size, config.patch_size_t
    size = (latents[3] // patch, latents[4] // patch)
    where: Inputs = {"crops_coords": ((0, 0), size), "temporal_size": latents[1]}
    if patch_t is not None:
        largest = (config.sample_height // patch, config.sample_width // patch)
        where = {"crops_coords": None, "temporal_size": latents[1] // patch_t, "grid_type": "slice"}
        where["max_size"] = largest
    if config.use_rotary_positional_embeddings:
        device = torch.device(noise.device)
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=size, device=device, **where
        )
    if config.ofs_embed_dim is not None:
        inputs["ofs"] = torch.full((1,), 2.0, dtype=noise.dtype, device=noise.device)
    return inputs


def _ltx(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    # 25 frames a second, of which 8 are one latent frame of 32 x 32 pixels.
    return {**noise.padded_text(128, config.caption_channels), "rope_interpolation_scale": (8 / 25, 32, 32)}


def _mochi(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    inputs = noise.padded_text(config.max_sequence_length, config.text_embed_dim)
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].bool()
    return inputs


def _allegro(config: Any, latents: tuple[int, ...], noise: Noise) -> Inputs:
    size = (latents[3] // config.patch_size, latents[4] // config.patch_size)
    *tables, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim,
        ((0, 0), size),
        size,
        latents[2],
        (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w),
        device=torch.device(noise.device),
    )
    positions = torch.cartesian_prod(*(axis.long() for axis in (frames, rows, columns)))
    rotary = (tuple(tables), tuple(positions.T[:, None].contiguous()))
    return {**noise.padded_text(512, config.caption_channels), "image_rotary_emb": rotary}


_INPUTS: dict[str, Callable[[Any, tuple[int, ...], Noise], Inputs]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _vace,
    "WanAnimateTransformer3DModel": _animate,
    "SkyReelsV2Transformer3DModel": _skyreels,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "MochiTransformer3DModel": _mochi,
    "AllegroTransformer3DModel": _allegro,
}
