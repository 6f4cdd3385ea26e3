"""What the commands must know of a diffusers pipeline class before its weights load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class that makes videos with a supported transformer.

    Attributes:
        image: what it does with an image: makes the video begin with it, does so if there is one, may look at it, or
            nothing.
        size_step: height and width must be multiples of it, whatever the configuration says: the pipeline checks it.
        frame_rest: what the number of frames leaves over when divided by the frames of one latent.
        any_frames: whether any number of frames will do, because the pipeline makes as many sections as it takes.
        compression: pixels of one latent along time and along height and width, where the VAE's configuration has no
            word for it.
        patch: latents along height and width of one token, likewise.
        layers: keys of the transformer's configuration that count or list its blocks, and how many by default.
        tiled_vae: whether its card decodes in tiles; the VAE needs tens of GB otherwise.
        exact_vae: class of the VAE, if it is loaded in float32 whatever the dtype of the rest.
        guider: whether guidance is a component of the pipeline, and no argument; such a pipeline takes no callback.
        packages: what it cannot be made or run without, beside what diffusers itself needs; names for import.
        in_code_only: why the commands cannot run it, None if they can.
    """

    image: Literal["none", "first", "first or none", "reference"] = "none"
    size_step: int = 16
    frame_rest: int = 1
    any_frames: bool = False
    compression: tuple[int, int] = (4, 8)
    patch: int = 2
    layers: tuple[tuple[str, int], ...] = (("num_layers", 40),)
    tiled_vae: bool = False
    exact_vae: str | None = None
    guider: bool = False
    packages: tuple[str, ...] = ()
    in_code_only: str | None = None

    @property
    def takes_image(self) -> bool:
        return self.image != "none"

    @property
    def begins_with_image(self) -> bool:
        """Whether an image that it is given is the video's first frame."""
        return self.image in ("first", "first or none")

    def layer_count(self, transformer: Mapping[str, Any]) -> int:
        """Number of transformer blocks."""
        values = (transformer.get(name, default) for name, default in self.layers)
        return sum(len(value) if isinstance(value, list) else value for value in values)

    def steps(self, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> tuple[int, int]:
        """What a video's height and width are multiples of, and its frames but for `frame_rest`.

        Args:
            vae, transformer: their configurations.
        """
        temporal, spatial = self.compression
        temporal = vae.get("scale_factor_temporal", vae.get("temporal_compression_ratio")) or temporal
        spatial = vae.get("scale_factor_spatial", vae.get("spatial_compression_ratio")) or spatial
        patch = transformer.get("patch_size", self.patch)
        if isinstance(patch, int):
            # A patch of two latent frames costs nothing here: CogVideoX 1.5 fills up and cuts off.
            patch = (1, patch, patch)
        frames = 1 if self.any_frames else temporal * patch[0]
        return math.lcm(self.size_step, spatial * patch[1], spatial * patch[2]), frames
