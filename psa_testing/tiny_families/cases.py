"""One row for every pipeline that is tested: how to make it, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from psa_testing.tiny_families import allegro, cogvideox, hunyuan_video, hunyuan_video15, ltx, mochi, wan_relatives
from psa_testing.tiny_pipelines import tiny_image, tiny_wan

COMMON = {
    "prompt": "dance monkey",
    "num_inference_steps": 4,
    "height": 128,
    "width": 128,
    "num_frames": 9,
    "output_type": "latent",
}
# A prompt of other length in the other branch: its padding is another.
GUIDED = {"negative_prompt": "bad", "guidance_scale": 5.0}
TWO_PROMPTS = {"prompt": ["a cat", "a longer prompt, about a dog"], "negative_prompt": ["", "bad"]}
HUNYUAN = {"prompt_template": {"template": "{}", "crop_start": 0}, "max_sequence_length": 32}
HUNYUAN_GUIDED = {"negative_prompt": "bad", "true_cfg_scale": 3.0, "guidance_scale": 1.0, **HUNYUAN}
HUNYUAN_IMAGE = {
    "image": tiny_image(128, 128),
    "prompt_template": {
        "template": "{}",
        "crop_start": 0,
        "image_emb_len": 49,
        "image_emb_start": 5,
        "image_emb_end": 54,
    },
    "max_sequence_length": 64,
}


@dataclass(frozen=True)
class Case:
    """A pipeline and its run: by default 3 x 8 x 8 video tokens, 4 steps.

    Attributes:
        make: builds the pipeline.
        inputs: arguments of its call.
        others: what to call it with besides: other sizes, frame counts and batches.
    """

    make: Callable[[], Any]
    inputs: dict[str, Any]
    others: tuple[dict[str, Any], ...] = field(default=())

    def run(self, pipe: Any, seed: int = 0, **overrides: Any) -> torch.Tensor:
        """Latents rather than frames: the VAE has no part in what is tested."""
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        arguments = {**COMMON, **self.inputs, "generator": generator, **overrides}
        # None stands for an argument that the pipeline does not have, or that another replaces.
        frames = pipe(**{name: value for name, value in arguments.items() if value is not None}).frames
        return torch.cat(frames, dim=2) if isinstance(frames, list) else frames  # Framepack: latents of each section


# All 3 x 8 x 8 video tokens unless a row says otherwise.
SIZES = ({"height": 96, "width": 160}, {"num_frames": 5, "height": 112, "width": 80})
SMALL_TEXT = {"max_sequence_length": 16}
IMAGE = tiny_image(128, 128)

# Not among the others: what depends on the pipeline is tested of Wan at more length, in test_processor.py.
WAN = Case(lambda: tiny_wan(num_layers=2), {**GUIDED, **SMALL_TEXT})

CASES: dict[str, Case] = {
    "hunyuan-video": Case(
        hunyuan_video.tiny_hunyuan_video, HUNYUAN_GUIDED, (*SIZES, TWO_PROMPTS, {"num_videos_per_prompt": 2})
    ),
    "hunyuan-video-distilled": Case(
        hunyuan_video.tiny_hunyuan_video,
        {"guidance_scale": 6.0, **HUNYUAN},
        ({"prompt": ["a cat", "a dog, running"]}, {"num_frames": 1}),
    ),
    "hunyuan-video-i2v": Case(
        hunyuan_video.tiny_hunyuan_video_i2v,
        {**HUNYUAN_GUIDED, **HUNYUAN_IMAGE, "num_inference_steps": 3},
        ({"true_cfg_scale": 1.0, "height": 96, "width": 160},),
    ),
    "hunyuan-video-i2v-concat": Case(
        lambda: hunyuan_video.tiny_hunyuan_video_i2v("latent_concat"),
        {**HUNYUAN_GUIDED, **HUNYUAN_IMAGE, "num_inference_steps": 3},
    ),
    "cogvideox-2b": Case(cogvideox.tiny_cogvideox_2b, {**GUIDED, **SMALL_TEXT}, ({"num_frames": 13}, TWO_PROMPTS)),
    "cogvideox-5b": Case(
        cogvideox.tiny_cogvideox_5b,
        {**GUIDED, **SMALL_TEXT},
        (*SIZES, TWO_PROMPTS, {"guidance_scale": 1.0}, {"use_dynamic_cfg": True, "num_videos_per_prompt": 2}),
    ),
    "cogvideox-1.5": Case(
        cogvideox.tiny_cogvideox_1_5,
        {**GUIDED, **SMALL_TEXT, "num_frames": 17},
        ({"num_frames": 9, "height": 96, "width": 160}, {"num_frames": 13}, TWO_PROMPTS),
    ),
    "cogvideox-i2v": Case(cogvideox.tiny_cogvideox_i2v, {**GUIDED, **SMALL_TEXT, "image": IMAGE}, SIZES[1:]),
    "wan-vace": Case(
        wan_relatives.tiny_wan_vace,
        {**GUIDED, **SMALL_TEXT, "height": 96, "width": 96, "num_inference_steps": 3},
        (
            {"height": 64, "width": 112},
            {"video": [IMAGE] * 9, "mask": [IMAGE.convert("L")] * 9, "reference_images": [IMAGE]},
        ),
    ),
    "wan-animate": Case(
        wan_relatives.tiny_wan_animate,
        {
            **GUIDED,
            "image": IMAGE,
            "pose_video": [IMAGE] * 9,
            "face_video": [tiny_image(16, 16)] * 9,
            "segment_frame_length": 9,
            "num_frames": None,
            "height": 96,
            "width": 96,
            "num_inference_steps": 3,
        },
    ),
    "hunyuan-video-1.5": Case(
        hunyuan_video15.tiny_hunyuan_video15,
        {"prompt": None, "height": 32, "width": 32, "num_frames": 5, **hunyuan_video15.embeddings(7)},
        (
            {"height": 24, "width": 40},
            hunyuan_video15.embeddings(10, 4),
            {**hunyuan_video15.embeddings(5, glyphs=0), "num_frames": 3},
        ),
    ),
    "ltx": Case(
        ltx.tiny_ltx,
        {**GUIDED, **SMALL_TEXT, "height": 32, "width": 32},
        ({"height": 64, "width": 32}, {"num_frames": 17}, {**TWO_PROMPTS, "num_videos_per_prompt": 2}),
    ),
    "ltx-i2v": Case(ltx.tiny_ltx_i2v, {**GUIDED, **SMALL_TEXT, "height": 32, "width": 32, "image": tiny_image(32, 32)}),
    "ltx-condition": Case(
        ltx.tiny_ltx_condition,
        {**GUIDED, **SMALL_TEXT, "height": 32, "width": 32, "image": tiny_image(32, 32), "strength": 1.0},
        ({"image": None}, {"frame_index": 8, "height": 64, "num_frames": 17}),
    ),
    "mochi": Case(
        mochi.tiny_mochi,
        {**GUIDED, **SMALL_TEXT, "num_frames": 13},
        (SIZES[0], {"num_frames": 7}, TWO_PROMPTS, {"num_videos_per_prompt": 2}),
    ),
    "skyreels-v2": Case(wan_relatives.tiny_skyreels_v2, {**GUIDED, **SMALL_TEXT}, (SIZES[1], TWO_PROMPTS)),
    "skyreels-v2-forcing": Case(wan_relatives.tiny_skyreels_v2_forcing, {**GUIDED, **SMALL_TEXT, "num_frames": 9}),
    "framepack": Case(
        hunyuan_video.tiny_framepack,
        {**HUNYUAN_GUIDED, "image": IMAGE, "latent_window_size": 3, "num_inference_steps": 3},
        ({"true_cfg_scale": 1.0, "guidance_scale": 4.0, "height": 96, "width": 160},),
    ),
    "allegro": Case(
        allegro.tiny_allegro,
        {**GUIDED, **SMALL_TEXT, "clean_caption": False},
        (SIZES[0], {"num_frames": 13}, TWO_PROMPTS),
    ),
}
