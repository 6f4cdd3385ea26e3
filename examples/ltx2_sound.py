"""LTX-2 makes a video with its sound; attention among the tokens of the video is sparse, that of the sound stays dense.

python examples/ltx2_sound.py --prompt "rain on a tin roof, thunder far away"
"""

import torch
import typer
from diffusers import LTX2Pipeline
from diffusers.utils import encode_video

from psa_diffusers import apply_psa


def main(
    prompt: str = "rain on a tin roof, thunder far away",
    model: str = "Lightricks/LTX-2",
    preset: str = "psa-3",
    device: str = "cuda",
    height: int = 704,
    width: int = 1216,
    num_frames: int = 121,
    num_inference_steps: int = 30,
    output: str = "ltx2.mp4",
) -> None:
    pipe = LTX2Pipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload(device=device)
    psa = apply_psa(pipe, preset)

    made = pipe(
        prompt=prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        frame_rate=24.0,
        num_inference_steps=num_inference_steps,
        guidance_scale=3.0,
        output_type="np",
    )
    rate = pipe.vocoder.config.output_sampling_rate
    sound = made.audio[0].float().cpu()
    encode_video(made.frames[0], fps=24, audio=sound, audio_sample_rate=rate, output_path=output)
    print(f"density of the sparse steps: {psa.stats().density_sparse}; {sound.shape[-1] / rate:.1f} s of sound")


if __name__ == "__main__":
    typer.run(main)
