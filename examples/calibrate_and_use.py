"""Make a preset for a model with psa-calibrate, at a density of your choice, and use it.

    python examples/calibrate_and_use.py prompts.txt --density 0.2

The text file has a prompt a line, at least four to measure on and one or more to verify with. Run again, it continues
where it was stopped.
"""

import subprocess
import sys

import torch
import typer
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from psa_diffusers import apply_psa


def main(
    prompts: str,
    density: float = 0.2,
    prompt: str = "a fox in snow",
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    base_preset: str = "psa-3",
    calibrated: str = "calibrated.yaml",
    held_out: int = 2,
    device: str = "cuda",
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    output: str = "calibrated.mp4",
) -> None:
    # The same as `psa-calibrate --model ... --prompts ...` in a shell.
    command = [sys.executable, "-m", "psa_diffusers.cli.calibrate", "--model", model, "--prompts", prompts]
    command += ["--density", str(density), "--base-preset", base_preset, "--held-out", str(held_out)]
    command += ["--height", str(height), "--width", str(width), "--frames", str(num_frames)]
    command += ["--steps", str(num_inference_steps), "--device", device, "--output", calibrated]
    subprocess.run(command, check=True)

    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtypes).to(device)
    psa = apply_psa(pipe, calibrated)
    size = {"height": height, "width": width, "num_frames": num_frames}
    video = pipe(prompt, **size, num_inference_steps=num_inference_steps).frames[0]
    export_to_video(video, output, fps=16)
    print(f"density of the sparse steps: {psa.stats().density_sparse}")


if __name__ == "__main__":
    typer.run(main)
