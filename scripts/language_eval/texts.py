"""Windows of text files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psa_diffusers.errors import InputError

SUFFIXES = (".txt", ".md", ".rst", ".py")
BYTES = 2  # a token has at least so many on average; shorter files are not read
LONGEST = 12  # characters a token that are read; more are not needed


@dataclass(frozen=True, eq=False)
class Text:
    """The first tokens of a file.

    Attributes:
        name: of the file, below the folder that was given.
        ids: int64 `[tokens]`.
    """

    name: str
    ids: torch.Tensor


def read_texts(folders: Sequence[Path], tokenizer: Any, tokens: int, count: int) -> list[Text]:
    """The first so many files of the folders that are long enough, in an order that is shuffled and always the same.

    Raises:
        InputError: there are fewer.
    """
    files = [(file, folder) for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES]
    files = [each for each in files if each[0].is_file() and each[0].stat().st_size >= BYTES * tokens]
    random.Random(0).shuffle(files)
    found: list[Text] = []
    for file, folder in files:
        if len(found) == count:
            break
        content = file.read_text(encoding="utf-8", errors="replace")[: LONGEST * tokens]
        ids = tokenizer.encode(content, add_special_tokens=False)[:tokens]
        if len(ids) == tokens:
            found.append(Text(str(file.relative_to(folder)), torch.tensor(ids)))
    if len(found) < count:
        raise InputError(
            f"--texts {' '.join(map(str, folders))}: {len(found)} files of {tokens} tokens or more "
            f"({', '.join(SUFFIXES)}), not {count}; give more folders, or fewer --count or --tokens"
        )
    return found
