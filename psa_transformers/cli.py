"""The command `psa-understand`. What is heavy is imported inside, so that --help answers at once."""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from psa_transformers.ask import Answer
    from psa_transformers.stats import PrefillStats

HELP = """Ask a vision-language model about a video, read with Pyramid Sparse Attention.

[bold]Example[/bold]

  psa-understand --model Qwen/Qwen2.5-VL-7B-Instruct film.mp4 "What happens?" --compare

Prints the answer, how long the prompt took to read, and the density of its attention.
"""
BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
# By name: the classes live in what is only imported when needed.
FORESEEN = ("QuestionError", "PresetError", "ImportError")

PACKAGES = ("psa-diffusers", "torch", "transformers")


def _show_version(wanted: bool) -> None:
    if wanted:
        import platform
        from importlib.metadata import version

        packages = [f"{name} {version(name)}" for name in PACKAGES]
        typer.echo(", ".join([*packages[:1], f"python {platform.python_version()}", *packages[1:]]))
        raise typer.Exit


app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(help=HELP, no_args_is_help=True)
def _understand(
    video: Annotated[Path, typer.Argument(help="A video file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[str, typer.Option(help="Folder or hub id of a vision-language model.")],
    preset: Annotated[str, typer.Option(help="Name or path of a preset.")] = "psa-auto",
    density: Annotated[float | None, typer.Option(help="The preset at this density, above 0 and up to 1.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also answer with dense attention, first.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of the video, evenly spaced.")] = 64,
    min_tokens: Annotated[int, typer.Option(min=0, help="Shorter prompts stay dense.")] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions.")
    ] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from psa_presets import choose_preset
    from psa_transformers.apply import apply_psa
    from psa_transformers.ask import ask, check_served, configuration, load, read_frames
    from psa_transformers.settings import check_sparse

    chosen = choose_preset(preset, density)
    config = configuration(model)
    check_sparse(chosen, config.get_text_config(decoder=True).num_hidden_layers)
    check_served(model, config, chosen)
    frames = read_frames(video, num_frames)
    loaded, processor = load(model, device)
    if compare:
        _print("dense", ask(loaded, processor, frames, question, max_new_tokens), None)
    with apply_psa(loaded, chosen, min_tokens=min_tokens) as psa:
        _print("sparse", ask(loaded, processor, frames, question, max_new_tokens), psa.stats())


def _print(name: str, answer: "Answer", stats: "PrefillStats | None") -> None:
    _write(f"{name}: {answer.text}")
    figures = f"{answer.prompt_tokens} tokens read in {answer.prefill_seconds:.2f} s"
    if stats is not None and stats.density is not None:
        figures += f", density {stats.density:.3f}"
    elif stats is not None:
        why = next(iter(stats.fallbacks), "the prompt is shorter than --min-tokens, or ends with its video")
        figures += f", nothing was sparse: {why}"
    _write(f"{name}: {figures}")


def _write(line: str) -> None:
    """Print a line; letters that the encoding of stdout lacks are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; what is wrong with the input becomes one line on stderr."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by `2>&-`; libraries write to it
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    try:
        command = typer.main.get_command(app)
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = command(args=given, prog_name="psa-understand", standalone_mode=False)
        if code == INTERRUPTED:  # what newer typers make of KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            _give_up_stdout()
            return _fail(f"cannot write: {error}", FAILURE)
        if hasattr(error, "format_message"):
            return _fail(error.format_message(), BAD_INPUT)
        if type(error).__name__ not in FORESEEN:
            raise
        return _fail(str(error), BAD_INPUT)


def _fail(message: str, code: int) -> int:
    print(f"psa-understand: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _give_up_stdout() -> None:
    """Let Python write what it still holds into nothing when it ends, instead of a second message."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def main() -> None:
    """Entry point of `psa-understand`."""
    sys.exit(run())


if __name__ == "__main__":
    main()
