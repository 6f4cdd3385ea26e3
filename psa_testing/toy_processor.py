"""A processor for the tiny Qwen2.5-VL: real ones need torchvision, whose builds do not go with a CPU build of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature

from psa_testing.tiny_language_models import VIDEO

SIDE, PATCH = 16, 14  # patches of a frame along each side, and their pixels


class ToyProcessor:
    """Takes and gives what the processor of Qwen2.5-VL does; a letter is a token."""

    @property
    def tokenizer(self) -> ToyTokenizer:
        return ToyTokenizer()

    def apply_chat_template(self, conversation: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        (turn,) = conversation
        return "".join("<video>" if part["type"] == "video" else part["text"] for part in turn["content"])

    def __call__(
        self,
        text: Sequence[str],
        videos: Sequence[np.ndarray],
        video_metadata: Sequence[dict[str, Any]],
        do_sample_frames: bool,
        return_tensors: str,
    ) -> BatchFeature:
        assert not do_sample_frames and return_tensors == "pt"
        assert [len(about["frames_indices"]) for about in video_metadata] == [len(video) for video in videos]
        (pixels,) = (torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1 for video in videos)
        pixels = F.interpolate(pixels, size=(SIDE * PATCH, SIDE * PATCH))
        pixels = pixels[: len(pixels) // 2 * 2].unflatten(0, (-1, 2))  # two frames a patch
        patches = pixels.unflatten(4, (SIDE, PATCH)).unflatten(3, (SIDE, PATCH)).permute(0, 3, 5, 2, 1, 4, 6)
        before, after = text[0].split("<video>")
        video = [VIDEO] * (len(pixels) * SIDE * SIDE // 4)
        ids = torch.tensor([[*map(_token, "." + before), *video, *map(_token, after)]])
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": torch.where(ids == VIDEO, 2, 0),
                "pixel_values_videos": patches.reshape(-1, 3 * 2 * PATCH * PATCH),
                "video_grid_thw": torch.tensor([[len(pixels), SIDE, SIDE]]),
            }
        )

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(token + 30) for token in row if token < 90) or "?" for row in ids.tolist()]


class ToyTokenizer:
    """That of the processor, and of tests with language models."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [*map(_token, text)]


def _token(letter: str) -> int:
    return 3 + ord(letter) % 170
