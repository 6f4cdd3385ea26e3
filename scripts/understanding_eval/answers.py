"""One question put to a model: the option that it finds most likely, and what the prompt took to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from psa_diffusers.errors import InputError
from psa_transformers.ask import Frames, first_forward, prompt


@dataclass(frozen=True)
class Choice:
    """What a model answered.

    Attributes:
        letter: of the option with the highest logit.
        said: the most likely of all tokens, as text; that it is no letter tells of a model that did not follow.
        prompt_tokens: of text and video.
        prefill_seconds: from the first token read to the first written, the vision tower included.
    """

    letter: str
    said: str
    prompt_tokens: int
    prefill_seconds: float


def letter_tokens(processor: Any, letters: str) -> list[list[int]]:
    """The tokens that an answer by a letter may begin with: the letter, with a space before it or without one.

    Raises:
        InputError: a letter is no token of its own.
    """
    found = []
    for letter in letters:
        encoded = [processor.tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
        single = sorted({tokens[0] for tokens in encoded if len(tokens) == 1})
        if not single:
            raise InputError(f"letter {letter!r}: the model's tokenizer has no token for it")
        found.append(single)
    return found


def choose(model: Any, processor: Any, frames: Frames, question: str, letters: str) -> Choice:
    """Let a model choose among options by the logits of their letters, so that each question has an answer."""
    tokens = letter_tokens(processor, letters)
    given = prompt(processor, frames, question).to(model.device)
    with first_forward(model) as seconds:
        out = model.generate(
            **given, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    logits = out.logits[0][0].float()
    (said,) = processor.batch_decode(out.sequences[:, -1:], skip_special_tokens=True)
    letter = letters[best(logits, tokens)]
    return Choice(letter, said.strip(), given["input_ids"].shape[1], seconds[0])


def best(logits: torch.Tensor, tokens: Sequence[Sequence[int]]) -> int:
    """Which option's most likely token is the most likely; the first one of equals.

    Args:
        logits: `[vocabulary]`.
        tokens: of each option.
    """
    return int(torch.stack([logits[list(each)].max() for each in tokens]).argmax())
