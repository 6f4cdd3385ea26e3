"""Needles: a line with a number, planted in other text, and the question for it at the end."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Dublin", "Hanoi", "Prague")
DIGITS = 5


@dataclass(frozen=True, eq=False)
class Needle:
    """A prompt that ends with the value that is asked for.

    Attributes:
        ids: int64 `[tokens]`.
        value: how many of the last tokens are the value.
    """

    ids: torch.Tensor
    value: int


def plant(filler: torch.Tensor, tokenizer: Any, depth: float, seed: int, planted: bool = True) -> Needle:
    """A prompt as long as the filler, which gives way to the needle and the question.

    Args:
        filler: int64 `[tokens]`.
        depth: where the needle stands, a share of the filler.
        seed: of the city and the number.
        planted: without the needle the value can only be guessed.
    """
    draw = random.Random(seed)
    city, number = draw.choice(CITIES), "".join(draw.choice("0123456789") for _ in range(DIGITS))
    question = f"The secret number of {city} is"

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    line = tokens(f"\n\n{question} {number}.\n\n")
    asked, value = tokens(f"\n\n{question}"), tokens(f" {number}")
    room = len(filler) - len(line) - len(asked) - len(value)
    if room < 1:
        raise ValueError(f"filler of {len(filler)} tokens: expected more than {len(filler) - room}")
    at = round(depth * room)
    middle = line if planted else filler[room : room + len(line)]
    return Needle(torch.cat((filler[:at], middle, filler[at:room], asked, value)), len(value))
