"""Tiny random modular pipelines, made of the components of the ordinary ones.

They run from the prompt, or its embeddings, to latents, some of them to frames. MiniMax-H3, which is modular only, has
a file of its own in `families/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15Blocks
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks

from psa_testing.cases import COMMON, Case, Inputs
from psa_testing.families.hunyuan_video15 import embeddings, tiny_hunyuan_video15
from psa_testing.families.ltx import tiny_ltx
from psa_testing.tiny_pipelines import tiny_wan


def modular(
    blocks: Callable[[], Any], build: Callable[[], Any], *, without: tuple[str, ...] = (), **components: Any
) -> ModularPipeline:
    """The blocks as a pipeline, with the components of another one that they know.

    Args:
        blocks: class of the blocks.
        build: makes the other pipeline.
        without: blocks to leave out.
        components: others, by name.
    """
    made = blocks()
    for name in without:
        made.sub_blocks.pop(name)
    pipe, parts = made.init_pipeline(), build().components
    known = {name: parts[name] for name in pipe._component_specs if parts.get(name) is not None}
    pipe.update_components(**{**known, **components})
    return pipe


def latents(pipe: ModularPipeline, arguments: Inputs) -> torch.Tensor:
    """Run a pipeline; the latents that its frames are decoded from."""
    return pipe(**arguments).get("latents")


_PROMPTS: Inputs = {**COMMON, "negative_prompt": "bad", "output_type": "pt"}
_EMBEDDINGS: Inputs = {"prompt": None, "height": 32, "width": 32, "num_frames": 5, "output_type": "pt"}

# By name, as in `CASES`; the tokens of all of them are 3 x 8 x 8. The default guider is ClassifierFreeGuidance.
MODULAR: dict[str, Case] = {
    # Decoding takes Wan's VAE longer than all steps.
    "wan": Case(
        partial(modular, WanBlocks, partial(tiny_wan, num_layers=2), without=("decode",)),
        {**_PROMPTS, "output_type": None},
        call=latents,
    ),
    "wan-2.2": Case(
        partial(modular, Wan22Blocks, partial(tiny_wan, two_stage=True, num_layers=2), without=("decode",)),
        {**_PROMPTS, "output_type": None},
        call=latents,
    ),
    "hunyuan-video-1.5": Case(
        # Its text encoders have no tiny build.
        partial(modular, HunyuanVideo15Blocks, tiny_hunyuan_video15, without=("text_encoder",)),
        {**_EMBEDDINGS, **embeddings(7)},
        call=latents,
    ),
    "ltx": Case(partial(modular, LTXBlocks, tiny_ltx), {**_PROMPTS, "height": 32, "width": 32}, call=latents),
}
