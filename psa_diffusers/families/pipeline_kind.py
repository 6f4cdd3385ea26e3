"""What the commands must know of a diffusers pipeline class before its weights load."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SoundOutput:
    """Where a pipeline's sound is, if it makes any.

    Attributes:
        rate: the attribute of the pipeline that tells the samples a second, by its path, such as
            "vocoder.config.output_sampling_rate".
        name: the output's: waveforms of all videos, [videos, channels, samples] or [videos, samples], in [-1, 1]. None
            there is no sound.
    """

    rate: str
    name: str = "audio"


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class that makes videos with a supported transformer.

    Attributes:
        image: what it does with an image: makes the video begin with it, does so if there is one, may look at it, or
            nothing.
        size_step: height and width must be multiples of it, whatever the configuration says: the pipeline checks it.
        frame_rest: what the number of frames leaves over when divided by the frames of one latent.
        frame_range: fewest and most frames, where it refuses others.
        only_frames: the one number of frames that it makes, whatever it is asked for.
        any_frames: whether any number of frames will do, because the pipeline makes as many sections as it takes.
        latent_frames: frames of latents that a transformer is given for so many frames of video, where these are not
            one for each `compression` of them.
        image_latents: frames of latents that an image adds, where it is none of the video's own.
        image_size: height and width in pixels of the video that it makes of an image, from the configurations of VAE
            and transformer, and those of the image; such a pipeline takes no size.
        compression: pixels of one latent along time and along height and width, where the VAE's configuration has no
            word for it.
        patch: latents along height and width of one token, likewise.
        layers: keys of the transformer's configuration that count or list its blocks, and how many by default.
        tiled_vae: whether its card decodes in tiles; the VAE needs tens of GB otherwise.
        exact_vae: class of the VAE, if it is loaded in float32 whatever the dtype of the rest.
        sound: where its sound is, None if it makes none.
        frame_rate: name of the argument that tells it the frames a second, if it is to be told: sound is made to last
            as long as they do.
        fps: frames a second, if it makes no other.
        guided: whether it takes guidance and a negative prompt; not if guidance is in the weights.
        guider: whether guidance is a component of the pipeline, and no argument; such a pipeline takes no callback.
        modular: whether it is a `ModularPipeline`, with a modular_model_index.json.
        workflows: those of a modular pipeline whose components are loaded; empty for all components.
        idle_steps: how many of the steps asked for call no transformer, because the last noise level is zero.
        packages: what it cannot be made or run without, beside what diffusers itself needs; names for import.
        in_code_only: why the commands cannot run it, None if they can.
    """

    image: Literal["none", "first", "first or none", "reference"] = "none"
    size_step: int = 16
    frame_rest: int = 1
    frame_range: tuple[int, int] | None = None
    only_frames: int | None = None
    any_frames: bool = False
    latent_frames: Callable[[int], int] | None = None
    image_latents: int = 0
    image_size: Callable[[Mapping[str, Any], Mapping[str, Any], int, int], tuple[int, int]] | None = None
    compression: tuple[int, int] = (4, 8)
    patch: int = 2
    layers: tuple[tuple[str, int], ...] = (("num_layers", 40),)
    tiled_vae: bool = False
    exact_vae: str | None = None
    sound: SoundOutput | None = None
    frame_rate: str | None = None
    fps: int | None = None
    guided: bool = True
    guider: bool = False
    modular: bool = False
    workflows: tuple[str, ...] = ()
    idle_steps: int = 0
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
        temporal, spatial = self._compression(vae)
        # A patch of two latent frames costs nothing here: CogVideoX 1.5 fills up and cuts off.
        patch = self._patch(transformer, frames=1)
        frames = 1 if self.any_frames else temporal * patch[0]
        return math.lcm(self.size_step, spatial * patch[1], spatial * patch[2]), frames

    def token_grid(
        self,
        vae: Mapping[str, Any],
        transformer: Mapping[str, Any],
        frames: int,
        height: int,
        width: int,
        with_image: bool = False,
    ) -> tuple[int, int, int]:
        """Video tokens along frames, height and width that the transformer is given at a time.

        Args:
            vae, transformer: their configurations.
            frames, height, width: of the video, in frames and pixels.
            with_image: whether it is given an image.
        """
        temporal, spatial = self._compression(vae)
        along, down, across = self._patch(transformer, frames=transformer.get("patch_size_t") or 1)
        if self.latent_frames is not None:
            latents = self.latent_frames(frames)
        else:
            latents = (frames - self.frame_rest) // temporal + (1 if self.frame_rest else 0)
        latents += self.image_latents * with_image
        return math.ceil(latents / along), height // (spatial * down), width // (spatial * across)

    def _compression(self, vae: Mapping[str, Any]) -> tuple[int, int]:
        """Frames of one latent, and its pixels along height and width."""
        temporal, spatial = self.compression
        temporal = vae.get("scale_factor_temporal", vae.get("temporal_compression_ratio")) or temporal
        return temporal, vae.get("scale_factor_spatial", vae.get("spatial_compression_ratio")) or spatial

    def _patch(self, transformer: Mapping[str, Any], frames: int) -> tuple[int, int, int]:
        """Latents of one token along frames, height and width; `frames` where the configuration has one number."""
        patch = transformer.get("patch_size", self.patch)
        along, down, across = (frames, patch, patch) if isinstance(patch, int) else patch
        return along, down, across
