"""Wan 2.2 A14B: a preset for each of its two experts, and the one that is not at work waits in the host's memory.

python examples/wan22_experts.py --preset psa-3 --preset-2 psa-4
"""

import torch
import typer
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from psa_diffusers import apply_psa


def main(
    prompt: str = "a fox in snow",
    model: str = "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    preset: str = "psa-3",
    preset_2: str = "psa-3",
    device: str = "cuda",
    height: int = 720,
    width: int = 1280,
    num_frames: int = 81,
    num_inference_steps: int = 40,
    output: str = "wan22.mp4",
) -> None:
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtypes)
    # Before the patch or after it; that makes no difference.
    pipe.enable_model_cpu_offload(device=device)

    with apply_psa(pipe, preset, preset_2=preset_2) as psa:
        size = {"height": height, "width": width, "num_frames": num_frames}
        guidance = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
        video = pipe(prompt, **size, **guidance, num_inference_steps=num_inference_steps).frames[0]
        stats = psa.stats()
    export_to_video(video, output, fps=16)

    for layer, density in zip(stats.layers, stats.density[-1], strict=True):
        # None: the last step is the second expert's alone.
        print(f"{layer}: {'did not run' if density is None else f'density {density:.3f}'} at the last step")


if __name__ == "__main__":
    typer.run(main)
