"""What each preset costs and saves on the bundled demo model: dense and sparse from the same seeds, on this machine.

    python scripts/bench_demo.py --presets psa-1 psa-3 psa-5 --prompts 3 --output docs/benchmarks/demo.json

Prints a table; the last line is one JSON document, the one that --output receives.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from results import publish

from psa_diffusers import apply_psa
from psa_diffusers.report.flicker import flicker
from psa_diffusers.report.metrics import psnr_and_ssim
from psa_diffusers.runs.step_clock import StepClock

PROMPTS = (
    "a large red striped circle moving right over a green checkerboard",
    "a small blue star circling over orange stripes",
    "a large purple dotted heart growing over a drifting dark cyan checkerboard",
    "a small yellow checkered square bouncing over a pink gradient",
    "a large green triangle moving up over blue stripes",
    "a large orange checkered star moving left over a purple wall",
)
DEMO = Path(__file__).resolve().parent.parent / "psa_diffusers" / "demo"


def generate(pipe: WanPipeline, prompt: str, seed: int, steps: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames `[frames, height, width, 3]` in 0..1 and what the clock tells of the run."""
    clock = StepClock("cpu")
    with clock.watching(pipe):
        frames = pipe(
            prompt,
            height=192,
            width=192,
            num_frames=33,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=clock.step,
        ).frames[0]
    return np.asarray(frames), clock.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["psa-1", "psa-2", "psa-3", "psa-4", "psa-5"])
    parser.add_argument("--prompts", type=int, default=3, help=f"1 to {len(PROMPTS)}")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe = WanPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)  # the name that all supported versions know
    pipe.set_progress_bar_config(disable=True)

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ("dense", *options.presets)}
    for seed, prompt in enumerate(PROMPTS[: options.prompts]):
        dense, seconds = generate(pipe, prompt, seed, options.steps)
        runs["dense"].append({"denoise_seconds": seconds["denoise"], "step_seconds": seconds["median_step"]})
        for preset in options.presets:
            with apply_psa(pipe, preset) as psa:
                video, seconds = generate(pipe, prompt, seed, options.steps)
            stats = psa.stats()
            figures = psnr_and_ssim(dense, video)
            runs[preset].append(
                {
                    "density_sparse": stats.density_sparse,
                    "density_run": stats.density_run,
                    "coverage": stats.coverage_sparse,
                    "psnr": figures["psnr"]["mean"],
                    "ssim": figures["ssim"]["mean"],
                    "flicker": flicker(dense, video)["mean"],
                    "denoise_seconds": seconds["denoise"],
                    "step_seconds": median(seconds["per_step"][stats.dense_steps :]),
                }
            )
            print(preset, {key: round(value, 4) for key, value in runs[preset][-1].items()}, flush=True)

    rows = [
        {"preset": name, **{key: round(mean(run[key] for run in results), 4) for key in results[0]}}
        for name, results in runs.items()
    ]
    print(f"\n{'preset':10}{'density':>9}{'PSNR':>8}{'SSIM':>8}{'flicker':>9}{'s a step':>10}{'s denoising':>13}")
    for row in rows:
        density, psnr, ssim, flick = (row.get(key) for key in ("density_sparse", "psnr", "ssim", "flicker"))
        figures = f"{density:>9.3f}{psnr:>8.2f}{ssim:>8.3f}{flick:>9.2f}" if psnr else f"{1:>9}{'-':>8}{'-':>8}{'-':>9}"
        print(f"{row['preset']:10}{figures}{row['step_seconds']:>10.2f}{row['denoise_seconds']:>13.1f}")
    what = "demo model, 33 x 192 x 192, guidance 4, fp32, means over prompts; sparse steps only in step_seconds"
    publish(what, rows, options.output, prompts=options.prompts, steps=options.steps, threads=options.threads)


if __name__ == "__main__":
    main()
