"""Prompts from the command line and from files, and the names of the folders they get."""

import re
import unicodedata
from pathlib import Path

from psa_diffusers.errors import InputError

SLUG_LENGTH = 48


def read_prompts(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Prompts in order: an argument that is a file gives one a line (blank lines and `#` comments skipped)."""
    prompts: list[str] = []
    for argument in arguments:
        path = _as_file(argument)
        if path is not None:
            prompts += _lines(path)
        elif argument.strip().endswith(".txt") and " " not in argument.strip():
            raise InputError(f"prompt file {argument}: no such file")
        elif not argument.strip():
            raise InputError("a prompt is empty; give some words, or a file with one prompt a line")
        else:
            prompts.append(argument.strip())
    if not prompts:
        raise InputError('no prompt given; try psa-generate "a red circle moving right"')
    return tuple(prompts)


def slug(text: str, length: int = SLUG_LENGTH) -> str:
    """A safe piece of a file name: lower-case ASCII words joined by hyphens, "prompt" if nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9.]+", "-", plain)
    words = re.sub(r"\.(?![0-9])|(?<![0-9])\.", "-", words)
    return re.sub(r"-+", "-", words)[:length].strip("-.") or "prompt"


def _as_file(argument: str) -> Path | None:
    try:
        return Path(argument) if Path(argument).is_file() else None
    except (OSError, ValueError):  # longer than a file name may be, or a null byte: a prompt then
        return None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"prompt file {path}: cannot be read ({error.strerror})") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"prompt file {path}: no prompt in it; write one a line ('#' starts a comment)")
    return prompts
