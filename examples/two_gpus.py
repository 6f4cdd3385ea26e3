"""One video on two GPUs: diffusers' context parallelism shares the video's tokens, PSA the heads inside attention.

torchrun --nproc-per-node 2 examples/two_gpus.py
"""

import torch
import torch.distributed as dist
import typer
from diffusers import ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video

from psa_diffusers import PSAProcessor, context_parallel_plan, psa_stats


def main(
    prompt: str = "a cat playing the piano",
    model: str = "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    preset: str = "psa-3",
    device: str = "cuda",
    height: int = 720,
    width: int = 1280,
    num_frames: int = 81,
    num_inference_steps: int = 50,
    seed: int = 0,
    output: str = "two_gpus.mp4",
) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank)
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(model, torch_dtype=dtypes).to(device)
    pipe.set_progress_bar_config(disable=rank > 0)

    config = ContextParallelConfig(ulysses_degree=ranks)
    pipe.transformer.enable_parallelism(config=config, cp_plan=context_parallel_plan(pipe.transformer))
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset))

    size = {"height": height, "width": width, "num_frames": num_frames}
    # All ranks begin with the same noise.
    noise = torch.Generator().manual_seed(seed)
    video = pipe(prompt, **size, num_inference_steps=num_inference_steps, generator=noise).frames[0]
    density = psa_stats(pipe).density_sparse
    print(f"rank {rank} of {ranks}: density of the sparse steps of this rank's heads: {density}")
    if rank == 0:
        export_to_video(video, output, fps=16)


if __name__ == "__main__":
    dist.init_process_group()
    try:
        typer.run(main)
    finally:
        dist.destroy_process_group()
