"""The questions of a benchmark: a folder with questions.json and the videos that it names."""

from __future__ import annotations

import hashlib
import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_diffusers.errors import InputError

FILE = "questions.json"
LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the letter of the right option alone."


@dataclass(frozen=True)
class Question:
    """One question with several options.

    Attributes:
        id: unique in the benchmark.
        video: the file.
        options: without their letters.
        answer: the letter of the right one.
    """

    id: str
    video: Path
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]

    def text(self) -> str:
        """What the model is asked, after the video."""
        options = [f"{letter}. {option}" for letter, option in zip(self.letters, self.options, strict=True)]
        return "\n".join([self.question, *options, INSTRUCTION])


def read_questions(folder: Path) -> tuple[list[Question], str]:
    """All questions, checked, and a digest of the file.

    Raises:
        InputError: the file or a video is not there, or a question is not in the form; one line says which.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
        found = json.loads(content)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON") from error
    if not isinstance(found, list) or not found:
        raise InputError(f"{path}: expected a list of questions, and at least one")
    questions = [_checked(item, f"{path}, question {number}", folder) for number, item in enumerate(found, start=1)]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(
                f"{path}: id {question.id!r} stands there twice; expected one of its own for each question"
            )
        seen.add(question.id)
    return questions, hashlib.sha256(content).hexdigest()


def _checked(item: Any, where: str, folder: Path) -> Question:
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected a mapping with id, video, question, options and answer")
    for name in ("id", "video", "question", "answer"):
        if not isinstance(item.get(name), str) or not item[name].strip():
            raise InputError(f"{where}: {name}={item.get(name)!r}; expected text")
    options = item.get("options")
    if (
        not isinstance(options, list)
        or not 2 <= len(options) <= len(LETTERS)
        or not all(isinstance(option, str) and option.strip() for option in options)
    ):
        raise InputError(f"{where}: options={options!r}; expected a list of 2 to {len(LETTERS)} texts")
    if item["answer"] not in (letters := list(LETTERS[: len(options)])):
        raise InputError(f"{where}: answer={item['answer']!r}; expected one of {', '.join(letters)}")
    video = folder / item["video"]
    if not video.is_file():
        raise InputError(f"{where}: video={item['video']!r}; expected a file below {folder}")
    return Question(item["id"], video, item["question"], _without_letters(options), item["answer"])


def _without_letters(options: list[str]) -> tuple[str, ...]:
    """Published options often begin with their letters, which are then not said twice."""
    if all(option.startswith(f"{letter}.") for letter, option in zip(LETTERS, options, strict=False)):
        return tuple(option[2:].strip() for option in options)
    return tuple(options)
