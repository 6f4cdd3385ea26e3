"""What each line of `bench_stack.py` costs in quality on the demo model, and what its cache skips there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from bench_demo import PROMPTS
from diffusers import FirstBlockCacheConfig, WanPipeline
from random_models import Machine
from stack_lines import Line, quantise_linear

from psa_diffusers import Preset, apply_psa
from psa_diffusers.report.metrics import psnr_and_ssim

DEMO = Path(__file__).resolve().parent.parent / "psa_diffusers" / "demo"
LARGE = {"height": 192, "width": 192, "num_frames": 33, "num_inference_steps": 50}
SMALL = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 4}


class Demo:
    """The demo model and its stock videos, one a prompt.

    Args:
        prompts: how many.
    """

    def __init__(self, machine: Machine, prompts: int) -> None:
        self._machine, self._prompts = machine, PROMPTS[:prompts]
        self._settings = SMALL if machine.tiny else LARGE
        self._pipe = WanPipeline.from_pretrained(DEMO, torch_dtype=machine.dtype).to(machine.device)
        self._pipe.set_progress_bar_config(disable=True)
        self._quantised = False
        self._stock = self._videos()

    def figures(self, line: Line) -> dict[str, Any]:
        """PSNR against stock videos, dB (None where all are equal), and the share of forwards that the cache skipped.

        Returns:
            `psnr`, and for the dense and the sparse steps `skipped_dense` and `skipped_sparse`.
        """
        transformer, preset = self._pipe.transformer, line.preset(self._machine)
        if line.float8 and not self._quantised:
            quantise_linear(transformer, line.float8)
            self._quantised = True
        if line.cache is not None:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=line.cache))
        try:
            with (
                apply_psa(self._pipe, preset) if line.psa else nullcontext() as processor,
                self._counting() as computed,
            ):
                videos = self._videos()
                if processor:
                    stats = processor.stats()
                    if stats.density_sparse is None:
                        raise RuntimeError(f"the demo model's attention was dense: {'; '.join(stats.fallbacks)}")
        finally:
            if line.cache is not None:
                transformer.disable_cache()
        found = [psnr_and_ssim(*pair)["psnr"]["mean"] for pair in zip(self._stock, videos, strict=True)]
        found = [value for value in found if value is not None]
        psnr = round(mean(found), 2) if found else None
        return {"psnr": psnr, **self._skipped(computed, preset)}

    def _videos(self) -> list[np.ndarray]:
        return [
            np.asarray(
                self._pipe(
                    prompt, guidance_scale=4.0, generator=torch.Generator().manual_seed(seed), **self._settings
                ).frames[0]
            )
            for seed, prompt in enumerate(self._prompts)
        ]

    @contextmanager
    def _counting(self) -> Iterator[list[bool]]:
        """Of each forward, whether more than its first block was computed."""
        computed: list[bool] = []
        transformer = self._pipe.transformer

        def mark(*_: Any) -> None:
            computed[-1] = True

        hooks = [
            transformer.register_forward_pre_hook(lambda *_: computed.append(False)),
            transformer.blocks[1].attn1.to_q.register_forward_hook(mark),
        ]
        try:
            yield computed
        finally:
            for hook in hooks:
                hook.remove()

    def _skipped(self, computed: list[bool], preset: Preset) -> dict[str, float]:
        steps = self._settings["num_inference_steps"]
        by_step = np.array(computed).reshape(len(self._prompts), steps, -1)
        dense = preset.dense_step_count(steps)
        parts = {"skipped_dense": by_step[:, :dense], "skipped_sparse": by_step[:, dense:]}
        return {name: round(1 - float(part.mean()), 4) for name, part in parts.items()}
