"""HunyuanVideo Framepack: HunyuanVideo that makes a video section by section, after tokens of the earlier frames."""

from __future__ import annotations

import torch

from psa_diffusers.families.hunyuan_video import HunyuanVideo


class Framepack(HunyuanVideo):
    """HunyuanVideoFramepackTransformer3DModel.

    The tokens of earlier frames are of several scales, so they form no blocks: they are attended exactly, as text is.
    Every section is a denoising run of its own.
    """

    name = "HunyuanVideo Framepack"
    transformers = ("HunyuanVideoFramepackTransformer3DModel",)
    history = True

    @staticmethod
    def parallel_plan(transformer: torch.nn.Module) -> None:
        # Its rotary tables are joined from several, each of which a plan would split.
        return None
