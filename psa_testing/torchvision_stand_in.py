"""The two functions of torchvision that Cosmos calls, for machines that lack it.

The builds of torchvision that package indexes have cannot be imported beside a CPU build of torch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict
from diffusers.utils import is_torchvision_available
from PIL import Image


def provide_torchvision() -> None:
    """Give diffusers' modules what they would have imported; nothing where torchvision is there."""
    if is_torchvision_available():
        return
    functional = SimpleNamespace(resize=_resize, to_tensor=_to_tensor)
    transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    modules: tuple[Any, ...] = (controlnet_cosmos, transformer_cosmos)
    for module in modules:
        module.transforms = transforms
    pipeline: Any = pipeline_cosmos2_5_predict
    pipeline.torchvision = SimpleNamespace(transforms=transforms)


def _resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
    """`[B, C, H, W]` at another height and width."""
    return F.interpolate(image, size=size, mode=interpolation)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """`[C, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
