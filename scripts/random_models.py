"""Published transformers at full size with random weights, made on the device where they stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from psa_testing.families import NETWORKS, PUBLISHED
from psa_testing.full_size import Noise, Published

ROOT = Path(__file__).resolve().parents[1]


def compile_forwards(transformer: torch.nn.Module, backend: str) -> list[torch.nn.Module]:
    """Compile the forward of each block that is alike, and return the blocks.

    Caches and context parallelism of diffusers wrap the forward. What they wrap is compiled here, so that one whole
    graph serves all blocks; compiled with the wrapping in it, blocks would get graphs of their own, or broken ones.
    """
    names = transformer._repeated_blocks or {type(block).__name__ for block in transformer.transformer_blocks}
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    return blocks


@dataclass(frozen=True)
class Workload:
    """One forward of one transformer.

    Attributes:
        checkpoint: whose configuration it is; one that psa_testing/families/ has.
        latents: shape of its hidden states, as `Published.latents` has it.
        branches: forwards a denoising step: 2 with classifier-free guidance.
        sizes: what else its pipeline tells the transformer about the size, where latents come as a sequence of tokens.
    """

    name: str
    checkpoint: str
    latents: tuple[int, ...]
    branches: int
    sizes: Mapping[str, int] = field(default_factory=dict)


WAN_14B, WAN_1_3B = "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
MINIMAX_H3 = "MiniMaxAI/MiniMax-H3"
LTX2 = "Lightricks/LTX-2.5-Diffusers"
KANDINSKY5 = "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers"
WAN_480P, WAN_720P = (1, 16, 21, 60, 104), (1, 16, 21, 90, 160)
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("wan2.1-1.3b-480p", WAN_1_3B, WAN_480P, 2),
        Workload("wan2.1-1.3b-720p", WAN_1_3B, WAN_720P, 2),
        Workload("wan2.1-14b-720p", WAN_14B, WAN_720P, 2),
        # Its guidance is distilled.
        Workload("hunyuanvideo-720p", "hunyuanvideo-community/HunyuanVideo", (1, 16, 33, 90, 160), 1),
        # 124, 243 and 362 frames with their sound, of which diffusers' pipeline makes up to 345; guidance is distilled.
        Workload("h3-5s", MINIMAX_H3, (1, 24, 37, 48, 84), 1),
        Workload("h3-10s", MINIMAX_H3, (1, 24, 72, 48, 84), 1),
        Workload("h3-15s", MINIMAX_H3, (1, 24, 107, 48, 84), 1),
        # The first stage of 121 frames at 512 x 768, and 241 at 1088 x 1920, with their sound.
        Workload("ltx2-512p-5s", LTX2, (1, 6144, 128), 2),
        Workload("ltx2-1080p-10s", LTX2, (1, 63240, 128), 2, {"num_frames": 31, "height": 34, "width": 60}),
        Workload("cosmos2.5-2b-720p", "nvidia/Cosmos-Predict2.5-2B", (1, 16, 24, 88, 160), 2),
        Workload("motif-video-720p", "Motif-Technologies/Motif-Video-2B", (1, 33, 31, 92, 160), 2),
        Workload("kandinsky5-lite-5s", KANDINSKY5, (1, 31, 64, 96, 33), 2),
        # The pipelines of these put both branches in one batch.
        Workload("cogvideox-5b", "zai-org/CogVideoX-5b", (1, 13, 16, 60, 90), 2),
        Workload("ltx-video-480p", "Lightricks/LTX-Video", (1, 6930, 128), 2),
    )
}


@dataclass(frozen=True)
class Machine:
    """Where it runs, and with what: the full size on a GPU, a toy on the CPU."""

    device: str
    dtype: torch.dtype
    backend: str
    tiny: bool


def pick_machine(tiny: bool, command: str) -> Machine:
    """The GPU, or with `tiny` the CPU.

    Raises:
        SystemExit: there is no CUDA device.
    """
    if tiny:
        return Machine("cpu", torch.float32, "eager", True)
    if not torch.cuda.is_available():
        raise SystemExit(f"{command}: no CUDA device; --tiny runs a toy on the CPU")
    return Machine("cuda", torch.bfloat16, "inductor", False)


@cache
def published_models() -> dict[str, Published]:
    """The published transformers by checkpoint."""
    return {published.checkpoint: published for published in PUBLISHED}


def build(checkpoint: str, machine: Machine, **changes: Any) -> torch.nn.Module:
    """A checkpoint's transformer with random weights, made where they stay; what is computed at its making is real.

    Args:
        changes: arguments of its class in place of the published ones.
    """
    published = published_models()[checkpoint]
    toy = NETWORKS[published.model].toy(published.config) if machine.tiny else {}
    with init_empty_weights(include_buffers=False):
        transformer = getattr(diffusers, published.model)(**{**published.config, **toy, **changes}).eval()
    # As `from_pretrained` does.
    keep = set(transformer._keep_in_fp32_modules or ())
    for name, parameter in list(transformer.named_parameters()):
        *path, last = name.split(".")
        dtype = torch.float32 if keep & set(name.split(".")) else machine.dtype
        weight = torch.empty(parameter.shape, dtype=dtype, device=machine.device)
        if parameter.dim() > 1:
            weight.normal_(std=0.02)
        else:
            weight.fill_(1.0 if last == "weight" else 0.0)
        setattr(transformer.get_submodule(".".join(path)), last, torch.nn.Parameter(weight, requires_grad=False))
    return transformer.to(machine.device)


def make_inputs(
    checkpoint: str,
    transformer: torch.nn.Module,
    machine: Machine,
    *,
    latents: tuple[int, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
    padding: float = 0.0,
) -> dict[str, Any]:
    """What the pipeline gives the transformer, as noise.

    Args:
        latents: shape of the hidden states; by default that of the checkpoint's default video.
        sizes: what else says how large the video is; likewise.
        padding: share of the text tokens that are padding, where the model is told which; how much is padding in a
            real run depends on the prompt.
    """
    published = published_models()[checkpoint]
    network, noise = NETWORKS[published.model], Noise(machine.dtype, machine.device, padding, machine.tiny)
    shape, sizes = latents or published.latents, sizes or published.inputs
    if machine.tiny:
        shape, sizes = network.toy_latents(replace(published, latents=shape)), network.toy_sizes
    return {**network.noise_inputs(transformer.config, shape, noise), **sizes}
