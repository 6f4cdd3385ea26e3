"""ChronoEdit: Wan's architecture, which edits an image as the last frame of a short video."""

from __future__ import annotations

from typing import ClassVar

from psa_diffusers.families.card import ModelCard
from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_diffusers.families.wan import Wan


class ChronoEdit(Wan):
    """ChronoEditTransformer3DModel.

    With temporal reasoning a run begins with a whole video and goes on with its first and last frame alone.
    """

    name = "ChronoEdit"
    order = 100
    transformers: ClassVar[tuple[str, ...]] = ("ChronoEditTransformer3DModel",)
    processors = Wan.processors


PIPELINES = {"ChronoEditPipeline": PipelineKind(image="first", exact_vae="AutoencoderKLWan", only_frames=5)}
CARDS = (
    ModelCard(
        name="chronoedit",
        hub_id="nvidia/ChronoEdit-14B-Diffusers",
        about="ChronoEdit image editing as a video of 5 frames, 14B, 720p; without temporal reasoning",
        pipeline="ChronoEditPipeline",
        height=720,
        width=1280,
        frames=5,
        negative_prompt="",
    ),
)
