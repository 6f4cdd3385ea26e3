"""Published transformers at full size with random weights, and what their pipelines give them, as noise."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Workload:
    """One forward of one transformer.

    Attributes:
        checkpoint: whose configuration it is; a row of tests/published_models.py.
        latents: shape of its hidden states.
        text: shape of the text embeddings.
        branches: forwards a denoising step: 2 with classifier-free guidance.
        tiny: what makes the configuration a toy.
    """

    name: str
    checkpoint: str
    latents: tuple[int, ...]
    text: tuple[int, int, int]
    branches: int
    tiny: dict[str, Any]
    tiny_latents: tuple[int, ...]


TINY_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 32,
}
TINY_HUNYUAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 32,
    "rope_axes_dim": (4, 6, 6),
}
TINY_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "max_text_seq_length": 16,
    "sample_height": 16,
    "sample_width": 16,
    "sample_frames": 9,
}
WAN_14B, WAN_1_3B = "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WAN_TEXT, WAN_TOY = (1, 512, 4096), (1, 16, 3, 16, 16)
WAN_480P, WAN_720P = (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("wan2.1-1.3b-480p", WAN_1_3B, WAN_480P, WAN_TEXT, 2, TINY_WAN, WAN_TOY),
        Workload("wan2.1-1.3b-720p", WAN_1_3B, WAN_720P, WAN_TEXT, 2, TINY_WAN, WAN_TOY),
        Workload("wan2.1-14b-720p", WAN_14B, WAN_720P, WAN_TEXT, 2, TINY_WAN, WAN_TOY),
        # Its guidance is distilled. All of the text is real: how much is padding depends on the prompt.
        Workload(
            "hunyuanvideo-720p",
            "hunyuanvideo-community/HunyuanVideo",
            (1, 16, 33, 90, 160),
            (1, 256, 4096),
            1,
            TINY_HUNYUAN,
            WAN_TOY,
        ),
        # Its pipeline puts both branches in one batch.
        Workload(
            "cogvideox-5b",
            "zai-org/CogVideoX-5b",
            (1, 13, 16, 60, 90),
            (1, 226, 4096),
            2,
            TINY_COGVIDEOX,
            (1, 3, 16, 16, 16),
        ),
    )
}


@dataclass(frozen=True)
class Machine:
    """Where it runs, and with what: the full size on a GPU, a toy on the CPU."""

    device: str
    dtype: torch.dtype
    backend: str
    tiny: bool


def build(workload: Workload, machine: Machine) -> torch.nn.Module:
    """The transformer with random weights, made where they stay; what is computed at its making is real."""
    published = _published(workload.checkpoint)
    config = {**published.config, **(workload.tiny if machine.tiny else {})}
    with init_empty_weights(include_buffers=False):
        transformer = getattr(diffusers, published.model)(**config).eval()
    # As `from_pretrained` does.
    keep = transformer._keep_in_fp32_modules or ()
    for name, parameter in list(transformer.named_parameters()):
        *path, last = name.split(".")
        dtype = torch.float32 if set(keep) & set(name.split(".")) else machine.dtype
        weight = torch.empty(parameter.shape, dtype=dtype, device=machine.device)
        if parameter.dim() > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(1.0 if last == "weight" else 0.0)
        setattr(transformer.get_submodule(".".join(path)), last, torch.nn.Parameter(weight, requires_grad=False))
    return transformer.to(machine.device)


def make_inputs(workload: Workload, transformer: torch.nn.Module, machine: Machine) -> dict[str, Any]:
    """What the pipeline gives the transformer, as noise."""
    latents = workload.tiny_latents if machine.tiny else workload.latents
    text = (1, 16, 32) if machine.tiny else workload.text
    tensor = {"dtype": machine.dtype, "device": machine.device}
    inputs = {
        "hidden_states": torch.randn(latents, **tensor),
        "encoder_hidden_states": torch.randn(text, **tensor),
        "timestep": torch.tensor([20], device=machine.device),
    }
    config = transformer.config
    if "HunyuanVideo" in type(transformer).__name__:
        inputs["encoder_attention_mask"] = torch.ones(text[:2], dtype=torch.long, device=machine.device)
        inputs["pooled_projections"] = torch.randn(1, config.pooled_projection_dim, **tensor)
        inputs["guidance"] = torch.tensor([6000.0], **tensor)
    if "CogVideoX" in type(transformer).__name__:
        frames, height, width = latents[1], latents[3] // config.patch_size, latents[4] // config.patch_size
        inputs["image_rotary_emb"] = diffusers.models.embeddings.get_3d_rotary_pos_embed(
            config.attention_head_dim,
            ((0, 0), (height, width)),
            (height, width),
            frames,
            device=torch.device(machine.device),
        )
    return inputs


def _published(checkpoint: str) -> Any:
    """A row of the tests' table, which is the one place of these configurations."""
    spec = importlib.util.spec_from_file_location("published_models", ROOT / "tests/published_models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return next(published for published in module.PUBLISHED if published.checkpoint == checkpoint)
