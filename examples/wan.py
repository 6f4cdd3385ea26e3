"""Text to video with Wan 2.1; one line makes its attention sparse.

python examples/wan.py --prompt "a cat playing the piano"
"""

import torch
import typer
from diffusers import WanPipeline
from diffusers.utils import export_to_video

from psa_diffusers import PSAProcessor, psa_stats


def main(
    prompt: str = "a cat playing the piano",
    model: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    preset: str = "psa-3",
    device: str = "cuda",
    height: int = 480,
    width: int = 832,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    output: str = "wan.mp4",
) -> None:
    # The VAE is better off in float32, as the model's card says.
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtypes).to(device)

    pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset))

    size = {"height": height, "width": width, "num_frames": num_frames}
    video = pipe(prompt, **size, num_inference_steps=num_inference_steps).frames[0]
    export_to_video(video, output, fps=16)

    stats = psa_stats(pipe)
    print(f"density of the sparse steps: {stats.density_sparse}; of the whole run: {stats.density_run}")
    print(f"calls that ran dense against the preset: {stats.fallbacks or 'none'}")


if __name__ == "__main__":
    typer.run(main)
