"""A LoRA for four steps on top of Wan: the first step stays dense, the other three are sparse.

    python examples/four_step_lora.py fast.safetensors

Take the scheduler's shift from the card of the LoRA that you use; 8 is only a common one.
"""

import torch
import typer
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import export_to_video

from psa_diffusers import apply_psa, load_preset


def main(
    lora: str,
    prompt: str = "a fox in snow",
    model: str = "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    preset: str = "psa-3",
    flow_shift: float = 8.0,
    device: str = "cuda",
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    output: str = "four_steps.mp4",
) -> None:
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtypes).to(device)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=flow_shift)
    pipe.load_lora_weights(lora)

    # A whole number is a number of steps; 0.25, the default, would be a share of them.
    psa = apply_psa(pipe, load_preset(preset).replace(dense_steps=1))

    size = {"height": height, "width": width, "num_frames": num_frames}
    video = pipe(prompt, **size, num_inference_steps=4, guidance_scale=1.0).frames[0]
    export_to_video(video, output, fps=16)
    stats = psa.stats()
    print(f"{stats.dense_steps} of {stats.steps} steps dense; density of the others: {stats.density_sparse}")


if __name__ == "__main__":
    typer.run(main)
