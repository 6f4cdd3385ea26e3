"""Prompts from the command line, files, pipes and stdin, and the names of the folders they get."""

import errno
import os
import re
import stat
import sys
import unicodedata
from pathlib import Path

from psa_diffusers.errors import InputError, printable
from psa_diffusers.runs.rank import launched_place

SLUG_LENGTH = 48
STDIN = "-"
MAX_BYTES = 64 * 2**20  # of a file of prompts; a pipe might never end
# The lines of such files are not prompts: they have headers, quotes, keys or brackets.
DATA_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".yaml", ".yml", ".md", ".xml", ".html")
ENDINGS = (".txt", *DATA_ENDINGS)
ACCEPTED = "give a text file with one prompt a line ('#' starts a comment), a pipe, or - for stdin"
IN_A_FILE = "if these are the words of a prompt, put them in a file or pipe them to -"


def read_prompts(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """The prompts in order. An argument is either the words of a prompt, or names a source with one prompt a line.

    `-` is stdin. Files and pipes that exist are read. An argument that looks like a path has to exist: one with a
    separator and without spaces, or one that ends like a file's name. Lines end at line feeds; blank lines and those
    that start with `#` are left out.

    Raises:
        InputError: the first argument that is neither, in one line.
    """
    prompts: list[str] = []
    for argument in arguments:
        if not argument.strip():
            raise InputError("a prompt is empty; give some words, or a file with one prompt a line")
        elif argument == STDIN or names_a_file(argument):
            prompts += read_prompt_file(argument)
        else:
            prompts.append(_decoded("prompt", argument).strip())
    if not prompts:
        raise InputError('no prompt given; try psa-generate "a red circle moving right"')
    return tuple(prompts)


def read_prompt_file(name: str, what: str = "prompt file") -> list[str]:
    """The prompts of a file, a pipe, or with `-` of stdin.

    Args:
        what: its name in error messages, such as the option that named it.

    Raises:
        InputError: there is no such file, or it is not text with a prompt in it.
    """
    shown = f"{what} {printable(name)}"
    prompts = _prompts(_stdin(shown) if name == STDIN else _content(name, shown), shown)
    if not prompts:
        raise InputError(f"{shown}: no prompt in it; write one a line ('#' starts a comment)")
    return prompts


def names_a_file(argument: str) -> bool:
    """Whether an argument is a file's name rather than words: it exists, or looks like a path."""
    text = argument.strip()
    looks = text.lower().endswith(ENDINGS)
    if not re.search(r"\s", text):
        # An ending starts with a letter: "3.5" has none, and neither has "U.S.A.".
        looks = looks or "/" in text or "\\" in text or re.search(r"\w\.[a-zA-Z]\w{0,7}$", text) is not None
    try:
        return looks or os.path.lexists(_path(argument))
    except (OSError, ValueError):  # a null byte
        return looks


def only_words(option: str, text: str) -> str:
    """The text of an option that reads no files.

    Raises:
        InputError: it names a file, or holds bytes that are not UTF-8.
    """
    word = text.strip()
    named = word.lower().endswith(ENDINGS) and not re.search(r"\s", word)
    if word == STDIN or named or (os.path.exists(_path(word)) and not os.path.isdir(_path(word))):
        raise InputError(f"{option} {printable(text)}: takes words, not a file")
    return _decoded(option, text)


def _decoded(what: str, text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{what} {printable(text)}: not UTF-8 text")
    return text


def slug(text: str, length: int = SLUG_LENGTH) -> str:
    """A safe piece of a file name: lower-case ASCII words joined by hyphens, "prompt" if nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9.]+", "-", plain)
    words = re.sub(r"\.(?![0-9])|(?<![0-9])\.", "-", words)
    return re.sub(r"-+", "-", words)[:length].strip("-.") or "prompt"


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name) if name == "~" or name.startswith("~/") else name)


def _content(name: str, shown: str) -> bytes:
    path = _path(name)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISDIR(kind):
            raise InputError(f"{shown}: is a folder; {ACCEPTED}")
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise InputError(f"{shown}: is a device or a terminal; {ACCEPTED}")
        if stat.S_ISREG(kind) and path.suffix.lower() in DATA_ENDINGS:
            raise InputError(f"{shown}: {path.suffix} files are not read; {ACCEPTED}")
        if stat.S_ISFIFO(kind):
            _alone(shown)
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        if getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError(f"{shown}: no such file; {IN_A_FILE}") from None
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{shown}: cannot be read ({reason})") from error


def _stdin(shown: str) -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(f"{shown}: stdin is a terminal or closed; pipe prompts to it, one a line")
    _alone(shown)
    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: stdin cannot be read ({type(error).__name__})") from error


def _alone(shown: str) -> None:
    ranks = launched_place().ranks
    if ranks > 1:
        raise InputError(f"{shown}: {ranks} processes were launched and cannot all read one pipe; give a file")


def _prompts(content: bytes, shown: str) -> list[str]:
    if len(content) > MAX_BYTES:
        raise InputError(f"{shown}: more than {MAX_BYTES // 2**20} MiB; {ACCEPTED}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown}: not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise InputError(f"{shown}: not text (null byte)")
    lines = [line.strip() for line in text.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]
