"""The bundled demo model: its self-attention at two sparse steps of dense runs, with guidance on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_judges.judges import Judge, Sample
from quality_lab.prompts import prompts_for

from psa_diffusers import load_preset
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.attend import QKV, Parts, TokenAttention
from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.patch.run import Forward
from psa_diffusers.patch.sites import Layer
from psa_kernels import AttentionStats

PROMPTS, SEED = 1, 20260
STEPS, OF_STEPS = (2, 4), 6
LAYERS = (1, 4, 6)


class Capture:
    """Computes every layer densely, and keeps q, k, v of the conditional forward at some steps."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, QKV, tuple[int, int, int]]] = []

    def __call__(
        self, attention: TokenAttention, layer: Layer, forward: Forward, qkv: QKV, call: AttentionCall
    ) -> tuple[Parts, list[AttentionStats]]:
        if forward.branch == 0 and forward.step in STEPS:
            q, k, v = (x.float().clone() for x in qkv)
            self.found.append((forward.step, layer.name, (q, k, v), forward.attended_grid))
        return attention.dense(qkv, call), []


def samples(_folders: Sequence[Path], names: set[str]) -> Iterator[Sample]:
    return samples_on("cpu", names)


def samples_on(device: str, names: set[str]) -> Iterator[Sample]:
    """The samples of the given names, computed in float32 on a device."""
    model = resolve_model("demo")
    card = model.card
    pipe = load_pipeline(model, dtype="float32", device=device, offload="none", flow_shift=card.flow_shift)
    pipe.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(prompts_for(PROMPTS, SEED)):
        if not any(name.startswith(f"{number} ") for name in names):
            continue
        capture = Capture()
        processor = PSAProcessor(pipe, load_preset("psa-3").replace(min_tokens=0), strict=True)
        processor.compute_with(capture)
        processor.install()
        try:
            pipe(
                prompt,
                negative_prompt=card.negative_prompt,
                height=card.height,
                width=card.width,
                num_frames=card.frames,
                num_inference_steps=OF_STEPS,
                guidance_scale=card.guidance,
                generator=torch.Generator().manual_seed(SEED + number),
                output_type="latent",
                callback_on_step_end=_stop,
            )
        finally:
            processor.restore()
        every = [layer.name for layer in processor.layers["transformer"]]
        for step, layer, (q, k, v), grid in capture.found:
            name = f"{number} {step} {every.index(layer)}"
            if name in names:
                yield Sample(name, q, k, v, grid)


def _stop(pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Leave the rest of the steps out once the last of `STEPS` is done."""
    pipe._interrupt = step >= max(STEPS)
    return values


JUDGE = Judge(
    name="demo",
    about="the bundled demo model, 4 heads of 64; layers 1, 4 and 6 of 8 at the steps 2 and 4 of 0 to 5 of a prompt "
    "that it was not trained on, guidance 4, the conditional forward: 5,184 tokens",
    names=tuple(f"{number} {step} {layer}" for number in range(PROMPTS) for step in STEPS for layer in LAYERS),
    samples=samples,
    block_query=128,
    block_key=64,
    orders=("hilbert", "raster", "tiles"),
    every=3,
)
