"""LTX-2: tiny random pipelines, whose parts are in `psa_testing/tiny_ltx2.py`, and the published transformers.

Their configurations are those of `scripts/convert_ltx2_to_diffusers.py` of diffusers (58eb52c), sizes and settings
those of its documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import LTX2ConditionPipeline, LTX2ImageToVideoPipeline, LTX2InContextPipeline, LTX2Pipeline
from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2AutoBlocks
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from psa_diffusers.families.ltx2 import LTX2
from psa_testing.cases import GUIDED, SMALL_TEXT, TWO_PROMPTS, Case, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.full_size import TOY_TOKENS, Inputs, Latents, Network, Noise, Published
from psa_testing.tiny_ltx2 import NEWER, NEWEST, parts
from psa_testing.tiny_pipelines import tiny_image


def tiny_ltx2() -> LTX2Pipeline:
    """LTX-2.0, text to video: split rotary tables, no gates."""
    return LTX2Pipeline(**parts(rope_type="split"))


def tiny_ltx2_i2v() -> LTX2ImageToVideoPipeline:
    """Image to video, with the other form of rotary tables; the first frame's tokens have timestep 0."""
    return LTX2ImageToVideoPipeline(**parts())


def tiny_ltx23() -> LTX2Pipeline:
    """LTX-2.3: gates, and blocks that may leave their attention out."""
    return LTX2Pipeline(**parts(rope_type="split", **NEWER))


def tiny_ltx25_condition() -> LTX2ConditionPipeline:
    """LTX-2.5 with conditions: those that are not at the beginning follow the video's tokens."""
    return LTX2ConditionPipeline(**parts(rope_type="split", **NEWEST))


def tiny_ltx23_references() -> LTX2InContextPipeline:
    """LTX-2.3 with a reference video, whose tokens follow those of the video, perhaps masked."""
    return LTX2InContextPipeline(**parts(rope_type="split", **NEWER))


def tiny_ltx23_modular() -> Any:
    """LTX-2.3 as blocks; guidance of all kinds is a component, one for the video and one for the sound."""
    pipe = LTX2AutoBlocks().init_pipeline()
    pipe.update_components(**parts(rope_type="split", **NEWER))
    for name in ("guider", "audio_guider"):
        pipe.update_components(**{name: getattr(pipe, name).new(spatio_temporal_guidance_blocks=[1])})
    return pipe


def _inputs(config: Any, latents: Latents, noise: Noise) -> Inputs:
    frames = 9 if noise.tiny else 126  # of sound, 25 a second; the default video has 121 frames, 24 a second
    widths = [config[f"{kind}num_attention_heads"] * config[f"{kind}attention_head_dim"] for kind in ("", "audio_")]
    if config.use_prompt_embeddings:
        widths = [config.caption_channels] * 2
    # The pipeline's masks hide no text.
    return {
        "encoder_hidden_states": noise.text(1024, widths[0]),
        "audio_encoder_hidden_states": noise.text(1024, widths[1]),
        "audio_hidden_states": noise(1, frames, config.audio_in_channels),
        "audio_num_frames": frames,
        "sigma": noise.timestep(),
        "use_cross_timestep": True,
    }


def _toy(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 1,
        "caption_channels": 32,
    }


_20 = Published(
    "Lightricks/LTX-2",
    "LTX2VideoTransformer3DModel",
    {
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "caption_channels": 3840,
        "num_layers": 48,
        "rope_type": "split",
    },
    latents=(1, 6144, 128),
    layers=48,
    heads=32,
    head_dim=128,
    grid=(16, 16, 24),
    inputs={"num_frames": 16, "height": 16, "width": 24},
    toy=True,
)
_23 = replace(_20, checkpoint="diffusers/LTX-2.3-Diffusers", config={**_20.config, **NEWER})
_25 = replace(_20, checkpoint="Lightricks/LTX-2.5-Diffusers", config={**_20.config, **NEWEST})

_ONE_PASS: Inputs = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
_RUN: Inputs = {**GUIDED, **SMALL_TEXT, **_ONE_PASS, "height": 32, "width": 32}
_ALL_GUIDANCE: Inputs = {
    **GUIDED,
    **SMALL_TEXT,
    "height": 32,
    "width": 32,
    "spatio_temporal_guidance_blocks": [1],
}
_IMAGE = tiny_image(32, 32)


def _conditions(*indices: int, strength: float = 1.0) -> list[LTX2VideoCondition]:
    return [LTX2VideoCondition(frames=_IMAGE, index=index, strength=strength, crf=0) for index in indices]


REFERENCES = [LTX2ReferenceCondition(frames=[_IMAGE] * 9, strength=1.0)]

TESTS = FamilyTests(
    family=LTX2,
    cases={
        "ltx2": Case(
            tiny_ltx2,
            _RUN,
            (
                {"height": 64, "width": 32},
                {"num_frames": 17, "guidance_scale": 1.0, "audio_guidance_scale": 1.0},
                {**TWO_PROMPTS, "num_videos_per_prompt": 2},
            ),
            one_each=True,
        ),
        "ltx2-i2v": Case(tiny_ltx2_i2v, {**_RUN, "image": _IMAGE, "image_crf": 0}, ({"width": 64}, TWO_PROMPTS)),
        "ltx2.3": Case(tiny_ltx23, _ALL_GUIDANCE, ({"num_frames": 17}, TWO_PROMPTS)),
        "ltx2.5-condition": Case(
            tiny_ltx25_condition,
            {**_RUN, "conditions": _conditions(0, -1)},
            ({"conditions": _conditions(1, 2, strength=0.7), "width": 64}, {"conditions": None}),
        ),
        "ltx2.3-references": Case(tiny_ltx23_references, {**_RUN, "reference_conditions": REFERENCES}),
        "ltx2.3-modular": Case(
            tiny_ltx23_modular,
            {**SMALL_TEXT, "negative_prompt": "bad", "height": 32, "width": 32},
            ({"image": _IMAGE, "image_crf": 0}, {"conditions": _conditions(-1)}),
            call=lambda pipe, arguments: pipe(**arguments).get("videos"),
        ),
    },
    networks={
        "LTX2VideoTransformer3DModel": Network(
            _inputs,
            _toy,
            toy_latents=lambda published: (1, 192, published.latents[2]),
            toy_sizes=dict(zip(("num_frames", "height", "width"), TOY_TOKENS, strict=True)),
        ),
    },
    published=(_20, _23, _25),
    parallel={
        "ltx2": ParallelCase(
            Case(lambda: LTX2Pipeline(**parts(rope_type="split")), _RUN), (Ranks(2, inputs=TWO_PROMPTS),)
        ),
        "ltx2-i2v": ParallelCase(Case(tiny_ltx2_i2v, {**_RUN, "image": _IMAGE, "image_crf": 0}), (Ranks(2, "patch"),)),
        "ltx2.3": ParallelCase(Case(tiny_ltx23, _ALL_GUIDANCE), (Ranks(2),)),
    },
    saved={"ltx2": SavedCase(tiny_ltx2, size=32, frames=9)},
)
