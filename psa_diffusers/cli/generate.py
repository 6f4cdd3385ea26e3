"""The commands `psa-generate` and `psa-compare`. What is heavy is imported inside, so that --help answers at once."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from psa_diffusers.cli.options import (
    OWN_DEFAULT,
    PLACE,
    Device,
    Dtype,
    Frames,
    Height,
    NegativePrompt,
    Offload,
    Steps,
    Width,
)
from psa_diffusers.errors import InputError
from psa_diffusers.runs.stopping import listen

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
OUT_OF_MEMORY = (
    "out of GPU memory; try --offload model or group, fewer --frames, or a smaller --height and --width; "
    "finished prompts are kept"
)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

GENERATE_HELP = """Generate videos with Pyramid Sparse Attention, and compare them with dense attention.

[bold]Examples[/bold]

  psa-generate --compare "a large red circle moving right"
  psa-generate --model wan --preset psa-3 prompts.txt
  psa-generate --model wan2.2-14b --offload model --compare "a fox in snow"
  psa-generate --model wan-i2v-14b-480p --image fox.jpg "the fox looks up"
  psa-generate --list

The first one runs the bundled demo model: offline, on a CPU, in minutes.

Each prompt gets a folder with its videos and figures; report.html shows them all. The same command,
run again, continues where it stopped. The last line on stdout is one JSON document.
"""

COMPARE_HELP = """Compare two videos of one size and length: side by side, filmstrip, PSNR and SSIM, in one report.html.

[bold]Example[/bold]

  psa-compare dense.mp4 psa-3.mp4 --output comparison

The first video is the reference. The last line on stdout is one JSON document.
"""

generate_app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
compare_app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from psa_diffusers.environment import versions

        typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


def _show_list(wanted: bool) -> None:
    if wanted:
        from psa_diffusers.checkpoints.listing import listing

        typer.echo(listing())
        raise typer.Exit


@generate_app.command(help=GENERATE_HELP, no_args_is_help=True)
def _generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT|FILE", help="Prompts, or files with one prompt a line ('#' comments)."),
    ] = None,
    model: Annotated[str, typer.Option(help="Alias (see --list), hub id, or folder of a saved pipeline.")] = "demo",
    preset: Annotated[str, typer.Option(help="Name (see --list), path of a YAML file, or 'dense'.")] = "psa-3",
    preset_2: Annotated[
        str | None, typer.Option(help="Another preset for the second of two transformers (Wan 2.2).")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run dense, same seed, and compare.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder [dim](default: psa-output/..., by the settings)[/dim].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every prompt's noise, dense and sparse alike.")] = 0,
    samples: Annotated[int, typer.Option(help="Videos of each prompt, with the seeds --seed, --seed + 1, ...")] = 1,
    steps: Steps = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale (of both experts).", rich_help_panel=OWN_DEFAULT)
    ] = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.", rich_help_panel=OWN_DEFAULT)] = None,
    negative_prompt: NegativePrompt = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
    num_processes: Annotated[
        int,
        typer.Option(help="Share the prompts among so many processes, each with a GPU.", rich_help_panel=PLACE),
    ] = 1,
    image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="First frame, for image-to-video models; for VACE a reference."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another run's results in the output folder.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where attention would fall back to dense.")] = False,
    vbench: Annotated[
        bool, typer.Option("--vbench", help="Also lay the videos out as VBench names them, in OUTPUT/vbench.")
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_show_list, help="Show every model and preset.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions.")
    ] = False,
) -> None:
    prepare_process()
    from psa_diffusers.runs.plan import Request, make_plan

    plan = make_plan(
        Request(
            prompts=tuple(prompts or ()),
            model=model,
            preset=preset,
            preset_2=preset_2,
            compare=compare,
            output=output,
            seed=seed,
            samples=samples,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            frames=frames,
            fps=fps,
            negative_prompt=negative_prompt,
            dtype=dtype,
            device=device,
            offload=offload,
            image=image,
            overwrite=overwrite,
            strict=strict,
            vbench=vbench,
        )
    )
    from psa_diffusers.runs.generate import Interrupted, run
    from psa_diffusers.runs.processes import check_devices, run_shared
    from psa_diffusers.runs.rank import launched_place

    place = launched_place()
    if num_processes < 1 or (num_processes > 1 and place.ranks > 1):
        allowed = "at least 1" if num_processes < 1 else f"left out, as {place.ranks} processes were launched already"
        raise InputError(f"--num-processes {num_processes}: must be {allowed}")
    if place.ranks > 1:
        check_devices(plan, place.local_rank + 1, overwrite_alone=True)
    try:
        summary = run_shared(plan, num_processes) if num_processes > 1 else run(plan, place)
    except Interrupted as stop:
        if not place.reports:
            raise typer.Exit(INTERRUPTED) from None
        missing = f"{stop.summary['missing']} of {len(plan.prompts)} prompts missing"
        again = "run the same command again" + (" without --overwrite" if overwrite else "")
        note(f"psa-generate: interrupted, {missing}; {again} to continue in {plan.output}")
        print_json({**stop.summary, "status": "interrupted"})
        raise typer.Exit(INTERRUPTED) from None
    if summary is None:
        return
    if sys.stderr.isatty():
        for entry in summary["prompts"]:
            note(_figures(entry))
    note(f"report: {summary['report']}")
    print_json(summary)
    if summary["missing"]:
        again = "run the same command again" + (" without --overwrite" if overwrite else "")
        note(f"psa-generate: {summary['missing']} of {len(plan.prompts)} prompts missing; {again} to make them")
        raise typer.Exit(FAILURE)


@compare_app.command(help=COMPARE_HELP, no_args_is_help=True)
def _compare(
    reference: Annotated[str, typer.Argument(metavar="A.mp4", help="The reference, such as the dense video.")],
    other: Annotated[str, typer.Argument(metavar="B.mp4", help="The video to hold against it.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions.")
    ] = False,
) -> None:
    from psa_diffusers.report.compare import compare_files

    summary = compare_files(reference, other, output, overwrite)
    note(f"report: {summary['report']}")
    print_json(summary)


def run_command(name: str, app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; what is wrong with the input becomes one line on stderr."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        code = command(args=given, prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except InputError as error:
        return _fail(name, str(error), BAD_INPUT)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(name, "interrupted", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # what typer says of the arguments
            return _fail(name, error.format_message() or "nothing given; the help says what is needed", BAD_INPUT)
        kind = type(error).__name__  # by name: the classes live in what is only imported when needed
        if kind == "OutOfMemoryError":
            return _fail(name, OUT_OF_MEMORY, FAILURE)
        if kind in ("PSAFallbackError", "FloatingPointError"):  # of --strict
            return _fail(name, str(error), FAILURE)
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            return _fail(name, f"cannot write: {error}; finished prompts are kept, run the same command again", FAILURE)
        import traceback

        traceback.print_exc()
        return _fail(name, f"{kind}: {error}", FAILURE)


def generate() -> None:
    """Entry point of `psa-generate`."""
    sys.exit(run_command("psa-generate", generate_app))


def compare() -> None:
    """Entry point of `psa-compare`."""
    sys.exit(run_command("psa-compare", compare_app))


def prepare_process() -> None:
    """Listen to requests to stop, and set what must be set before transformers and diffusers are imported."""
    listen()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _figures(entry: dict[str, Any]) -> str:
    parts = [f"{name} {seconds:.1f} s" for name, seconds in entry["seconds"].items()]
    forms = {"density": "density {:.2f}", "psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}"}
    parts += [form.format(entry[key]) for key, form in forms.items() if entry[key] is not None]
    return f"{entry['folder']}: {', '.join(parts)}"


def _fail(name: str, message: str, code: int) -> int:
    note(f"{name}: error: {' '.join(message.split())}")
    return code


def note(message: str) -> None:
    """Say something to whoever watches, on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_json(content: Any) -> None:
    """The last line on stdout."""
    print(json.dumps(content, ensure_ascii=False), flush=True)
