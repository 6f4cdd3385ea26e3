"""HunyuanVideo Framepack: HunyuanVideo that makes a video section by section, after tokens of the earlier frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from psa_diffusers.families.card import ModelCard, Part
from psa_diffusers.families.hunyuan_video import TEXT_TO_VIDEO, HunyuanVideo


class Framepack(HunyuanVideo):
    """HunyuanVideoFramepackTransformer3DModel.

    The tokens of earlier frames are of several scales, so they form no blocks: they are attended exactly, as text is.
    Every section is a denoising run of its own.
    """

    name = "HunyuanVideo Framepack"
    order = 80
    transformers = ("HunyuanVideoFramepackTransformer3DModel",)
    processors = HunyuanVideo.processors
    history = True

    @staticmethod
    def parallel_plan(transformer: Any) -> None:
        # Its rotary tables are joined from several, each of which a plan would split.
        return None


def _of_one_section(frames: int) -> int:
    """Latents of a section, however long the video is: the default of its pipeline."""
    return 9


PIPELINES = {
    "HunyuanVideoFramepackPipeline": replace(
        TEXT_TO_VIDEO, image="first", frame_rest=0, any_frames=True, latent_frames=_of_one_section
    ),
}
_REDUX = "lllyasviel/flux_redux_bfl"
CARDS = (
    ModelCard(
        name="framepack",
        hub_id="hunyuanvideo-community/HunyuanVideo",
        about="HunyuanVideo Framepack image to video, 13B, in sections; transformer of lllyasviel/FramePackI2V_HY",
        pipeline="HunyuanVideoFramepackPipeline",
        height=832,
        width=480,
        frames=91,
        steps=30,
        guidance=9.0,
        fps=30,
        negative_prompt="",
        parts=(
            Part("transformer", "diffusers", "HunyuanVideoFramepackTransformer3DModel", "lllyasviel/FramePackI2V_HY"),
            Part("feature_extractor", "transformers", "SiglipImageProcessor", _REDUX, "feature_extractor"),
            Part("image_encoder", "transformers", "SiglipVisionModel", _REDUX, "image_encoder"),
        ),
    ),
)
