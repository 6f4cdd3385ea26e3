"""A question about a video, read with Pyramid Sparse Attention by a vision-language model of transformers.

python examples/video_qa.py film.mp4 "What happens?"
"""

from pathlib import Path

import torch
import typer

from psa_transformers import apply_psa
from psa_transformers.ask import ask, load, read_frames


def main(
    video: Path,
    question: str = "What happens?",
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
    preset: str = "psa-auto",
    num_frames: int = 64,
    min_tokens: int = 8192,
    max_new_tokens: int = 64,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    loaded, processor = load(model, device)
    frames = read_frames(video, num_frames)
    with apply_psa(loaded, preset, min_tokens=min_tokens) as psa:
        answer = ask(loaded, processor, frames, question, max_new_tokens)
    stats = psa.stats()
    print(answer.text)
    print(f"{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s, density {stats.density or 1:.3f}")
    for reason, calls in stats.fallbacks.items():
        print(f"{calls} calls of attention were dense: {reason}")


if __name__ == "__main__":
    typer.run(main)
