"""Videos of a pipeline, dense and sparse from the same seeds, in batches; the dense ones are made once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from quality_lab.figures import flicker, psnr, ssim
from quality_lab.prompts import prompts_for
from quality_lab.settings import Setting

from psa_diffusers import RunStats, apply_psa
from psa_diffusers.checkpoints.aliases import ModelCard
from psa_diffusers.errors import InputError

Row = dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """What all settings of a run share.

    Video i has the seed `seed + i`; the first `ssim_prompts` videos are given an SSIM.
    """

    prompts: int
    steps: int
    batch: int
    seed: int
    height: int
    width: int
    frames: int
    ssim_prompts: int


class Dense:
    """Dense videos `[prompts, frames, 3, height, width]` in 0..1 on the CPU, and what is told of them.

    `about` holds seconds a video and how busy the pictures are: the mean absolute difference of pixels eight apart,
    along both sides.
    """

    def __init__(self, videos: torch.Tensor, seconds: float) -> None:
        self.videos = videos
        across = (videos[..., 8:] - videos[..., :-8]).abs().mean().item()
        down = (videos[..., 8:, :] - videos[..., :-8, :]).abs().mean().item()
        self.about: Row = {"seconds": round(seconds, 4), "difference_8_pixels": round((across + down) / 2, 4)}


class Lab:
    """A loaded pipeline and its dense videos."""

    def __init__(self, pipe: Any, card: ModelCard, conditions: Conditions) -> None:
        self._pipe, self._card, self._conditions = pipe, card, conditions
        self._dense: dict[str | None, Dense] = {}
        pipe.set_progress_bar_config(disable=True)

    def dense(self, content: str | None) -> Dense:
        """The dense videos of the prompts with one kind of background."""
        if content not in self._dense:
            batches = list(self._batches(content))
            videos = torch.cat([videos for videos, _ in batches])
            self._dense[content] = Dense(videos, min(seconds for _, seconds in batches))
        return self._dense[content]

    def measure(self, setting: Setting) -> Row:
        """The figures of one setting.

        `density` and `coverage` are means over prompts and sparse calls, `density_run` over all calls; `psnr` has an
        entry a prompt; `flicker` is a mean over prompts; `seconds` are those a video takes in the fastest batch, with
        its decoding.

        Raises:
            InputError: attention could not be sparse.
        """
        reference = self.dense(setting.content)
        runs: list[tuple[int, RunStats]] = []
        psnrs, ssims, flickers, seconds = [], [], [], []
        with apply_psa(self._pipe, setting.preset) as psa:
            psa.processor.compute_with(setting.compute)
            for videos, taken in self._batches(setting.content):
                start = len(psnrs)
                dense = reference.videos[start : start + len(videos)]
                psnrs += psnr(dense, videos)
                flickers += flicker(dense, videos)
                with_ssim = max(0, self._conditions.ssim_prompts - start)
                ssims += ssim(dense[:with_ssim], videos[:with_ssim])
                seconds.append(taken)
                stats = psa.stats()
                if stats.fallbacks or stats.density_sparse is None:
                    reason = next(iter(stats.fallbacks), "every step is dense")
                    raise InputError(f"{setting.name}: attention was dense: {reason}")
                runs.append((len(videos), stats))
        return {
            "density": _mean(runs, "density_sparse"),
            "coverage": _mean(runs, "coverage_sparse"),
            "density_run": _mean(runs, "density_run"),
            "psnr": psnrs,
            "ssim": round(mean(ssims), 5) if ssims and None not in ssims else None,
            "ssim_prompts": len(ssims),
            "flicker": round(mean(flickers), 4),
            "seconds": round(min(seconds), 4),
            "implementation": runs[0][1].implementation,
        }

    def _batches(self, content: str | None) -> Iterator[tuple[torch.Tensor, float]]:
        """Videos of one batch after the other, on the CPU, and seconds a video."""
        now, card = self._conditions, self._card
        prompts = prompts_for(now.prompts, now.seed, content)
        more: dict[str, Any] = {} if card.guidance_2 is None else {"guidance_scale_2": card.guidance_2}
        for first in range(0, now.prompts, now.batch):
            chosen = prompts[first : first + now.batch]
            started = time.perf_counter()
            videos = self._pipe(
                prompt=chosen,
                negative_prompt=[card.negative_prompt] * len(chosen),
                height=now.height,
                width=now.width,
                num_frames=now.frames,
                num_inference_steps=now.steps,
                guidance_scale=card.guidance,
                generator=[torch.Generator("cpu").manual_seed(now.seed + first + i) for i in range(len(chosen))],
                output_type="pt",
                **more,
            ).frames
            videos = videos.float().cpu()  # waits for the device
            yield videos, (time.perf_counter() - started) / len(chosen)


def _mean(batches: Sequence[tuple[int, RunStats]], figure: str) -> float:
    weight = sum(videos for videos, _ in batches)
    return round(sum(videos * getattr(stats, figure) for videos, stats in batches) / weight, 5)
