"""What all commands do towards the shell: exit codes, one line for bad input, one JSON document, requests to stop."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from psa_diffusers.errors import InputError
from psa_diffusers.runs import stopping

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
SMALLER = "fewer --frames, or a smaller --height and --width"
# What a command that failed has kept, where it keeps something.
KEPT = {
    "psa-generate": "finished prompts are kept",
    "psa-calibrate": "what was measured is kept",
}
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class Stopped(Exception):
    """A command was asked to stop, and has told what that means."""


def new_app() -> typer.Typer:
    """An app for one command."""
    return typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def run_command(name: str, app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; what is wrong with the input becomes one line on stderr."""
    _open_streams()
    with stopping.listening():
        try:
            command: Callable[..., Any] = typer.main.get_command(app)
            given = list(sys.argv[1:] if arguments is None else arguments)
            code = command(args=given, prog_name=name, standalone_mode=False)
            if code == INTERRUPTED:  # what newer typers make of KeyboardInterrupt
                raise KeyboardInterrupt
            return code if isinstance(code, int) else 0
        except Stopped:
            return INTERRUPTED
        except typer.Exit as stop:
            return stop.exit_code
        except (typer.Abort, KeyboardInterrupt):
            return _fail(name, "interrupted", INTERRUPTED)
        except Exception as error:
            return _tell(name, error)


def _tell(name: str, error: Exception) -> int:
    """Print one line about an error, after a traceback if it was not expected; return the exit code."""
    if isinstance(error, InputError):
        return _fail(name, str(error), BAD_INPUT)
    if hasattr(error, "format_message"):  # what typer says of the arguments
        return _fail(name, error.format_message() or "nothing given; the help says what is needed", BAD_INPUT)
    kind = type(error).__name__  # by name: the classes live in what is only imported when needed
    if kind == "OutOfMemoryError":
        return _fail(name, _with_kept(name, f"out of GPU memory; try --offload model or group, {SMALLER}"), FAILURE)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # PyTorch has no class for the latter
        way = "" if name == "psa-compare" else f"; try {SMALLER}"
        return _fail(name, _with_kept(name, f"out of memory{way}"), FAILURE)
    if kind in ("PSAFallbackError", "FloatingPointError"):  # of --strict
        return _fail(name, str(error), FAILURE)
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        again = ", run the same command again" if name in KEPT else ""
        return _fail(name, _with_kept(name, f"cannot write: {error}") + again, FAILURE)
    import traceback

    traceback.print_exception(error)
    return _fail(name, f"{kind}: {error}", FAILURE)


def _with_kept(name: str, message: str) -> str:
    return f"{message}; {KEPT[name]}" if name in KEPT else message


def _fail(name: str, message: str, code: int) -> int:
    note(f"{name}: error: {' '.join(message.split())}")
    return code


def _open_streams() -> None:
    """Let a process that was started without stdout or stderr (`2>&-`) write into nothing."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


def prepare_libraries() -> None:
    """Set what must be set before transformers and diffusers are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def note(message: str) -> None:
    """Print a message for people, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """The last line on stdout; letters that its encoding lacks are escaped, as JSON allows."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(content)
    print(text, flush=True)
