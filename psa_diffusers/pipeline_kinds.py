"""What the commands must know of a diffusers pipeline class before its weights load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class that `--model` takes.

    Attributes:
        takes_image: whether it makes a video from an image.
        size_step: height and width must be multiples of it, whatever the configuration says: the pipeline checks it.
        compression: pixels of one latent along time and along height and width, where the VAE's configuration has no
            word for it.
        layers: keys of the transformer's configuration that count its blocks, and what each is by default.
        tiled_vae: whether its card decodes in tiles; the VAE needs tens of GB otherwise.
        exact_vae: class of the VAE, if it is loaded in float32 whatever the dtype of the rest.
    """

    takes_image: bool = False
    size_step: int = 16
    compression: tuple[int, int] = (4, 8)
    layers: tuple[tuple[str, int], ...] = (("num_layers", 40),)
    tiled_vae: bool = False
    exact_vae: str | None = None

    def layer_count(self, transformer: Mapping[str, Any]) -> int:
        """Number of transformer blocks."""
        return sum(transformer.get(name, default) for name, default in self.layers)

    def steps(self, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> tuple[int, int]:
        """What a video's height and width are multiples of, and its frames one more than a multiple of.

        Args:
            vae, transformer: their configurations.
        """
        temporal, spatial = self.compression
        temporal = vae.get("scale_factor_temporal", vae.get("temporal_compression_ratio")) or temporal
        spatial = vae.get("scale_factor_spatial", vae.get("spatial_compression_ratio")) or spatial
        patch = transformer.get("patch_size", 2)
        if isinstance(patch, int):
            # A patch of two latent frames costs nothing here: CogVideoX 1.5 fills up and cuts off.
            patch = (1, patch, patch)
        return math.lcm(self.size_step, spatial * patch[1], spatial * patch[2]), temporal * patch[0]


WAN = {"exact_vae": "AutoencoderKLWan"}
HUNYUAN = {"layers": (("num_layers", 20), ("num_single_layers", 40)), "tiled_vae": True}
COGVIDEOX = {"layers": (("num_layers", 30),), "tiled_vae": True}
LTX = {"layers": (("num_layers", 28),), "size_step": 32, "compression": (8, 32)}

PIPELINE_KINDS: dict[str, PipelineKind] = {
    "WanPipeline": PipelineKind(**WAN),
    "WanImageToVideoPipeline": PipelineKind(takes_image=True, **WAN),
    "HunyuanVideoPipeline": PipelineKind(**HUNYUAN),
    "HunyuanVideoImageToVideoPipeline": PipelineKind(takes_image=True, **HUNYUAN),
    "CogVideoXPipeline": PipelineKind(**COGVIDEOX),
    "CogVideoXImageToVideoPipeline": PipelineKind(takes_image=True, **COGVIDEOX),
    "LTXPipeline": PipelineKind(**LTX),
    "LTXImageToVideoPipeline": PipelineKind(takes_image=True, **LTX),
    "MochiPipeline": PipelineKind(layers=(("num_layers", 48),), compression=(6, 8), tiled_vae=True),
    "SkyReelsV2Pipeline": PipelineKind(**WAN),
    "SkyReelsV2ImageToVideoPipeline": PipelineKind(takes_image=True, **WAN),
}
