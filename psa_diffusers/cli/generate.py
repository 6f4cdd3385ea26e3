"""The command `psa-generate`. What is heavy is imported inside, so that --help answers at once."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psa_diffusers.cli.options import OWN_DEFAULT, PLACE, Density, Seed, Version, with_run_options
from psa_diffusers.cli.shell import (
    FAILURE,
    Stopped,
    new_app,
    note,
    prepare_libraries,
    print_json,
    run_command,
)
from psa_diffusers.errors import InputError

if TYPE_CHECKING:
    from psa_diffusers.runs.plan import Plan

GENERATE_HELP = """Generate videos with Pyramid Sparse Attention, and compare them with dense attention.

[bold]Examples[/bold]

  psa-generate --compare "a large red circle moving right"
  psa-generate --model wan --preset psa-3 prompts.txt
  psa-generate --model wan --density 0.2 "a fox in snow"
  psa-generate --model wan2.2-14b --offload model --compare "a fox in snow"
  psa-generate --model wan-i2v-14b-480p --image fox.jpg "the fox looks up"
  psa-generate --model wan --lora fast.safetensors:0.8 --steps 4 "a fox in snow"
  psa-generate --check --model wan-14b --density 0.2
  psa-generate --list

The first one runs the bundled demo model: offline, on a CPU, in minutes.

An argument that names a file or looks like one (prompts.txt, day/one) must be a text file or a
pipe with one prompt a line; .csv, .json and other data are refused.

Each prompt gets a folder with its videos and figures; report.html shows them all. The same command,
run again, continues where it stopped. The last line on stdout is one JSON document.
"""

generate_app = new_app()


def _show_list(wanted: bool) -> None:
    if wanted:
        from psa_diffusers.checkpoints.listing import listing

        typer.echo(listing())
        raise typer.Exit


@generate_app.command(help=GENERATE_HELP, no_args_is_help=True)
@with_run_options
def _generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT|FILE", help="Prompts, or text files or pipes with one a line ('#' comments); - is stdin."
        ),
    ] = None,
    *,
    options: dict[str, Any],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Name (see --list), path of a YAML file, or 'dense' "
            "[dim](default: psa-3, with --density psa-auto)[/dim]."
        ),
    ] = None,
    density: Density = None,
    preset_2: Annotated[
        str | None, typer.Option(help="Another preset for the second of two transformers (Wan 2.2).")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also run dense, same seed, and compare.")] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder [dim](default: in psa-output, named by the settings)[/dim]."),
    ] = None,
    seed: Seed = 0,
    samples: Annotated[int, typer.Option(help="Videos of each prompt, with the seeds --seed, --seed + 1, ...")] = 1,
    fps: Annotated[int | None, typer.Option(help="Frames a second.", rich_help_panel=OWN_DEFAULT)] = None,
    num_processes: Annotated[
        int,
        typer.Option(help="Share the prompts among so many processes, each with a GPU.", rich_help_panel=PLACE),
    ] = 1,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the transformer's blocks with torch.compile: slower first steps, faster others.",
            rich_help_panel=PLACE,
        ),
    ] = False,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Capture each kind of forward into a CUDA graph and replay it "
            "[dim](default: on a GPU where attention is little work)[/dim].",
            rich_help_panel=PLACE,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another run's results in the output folder.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where attention would fall back to dense.")] = False,
    vbench: Annotated[
        bool, typer.Option("--vbench", help="Also lay the videos out as VBench names them, in OUTPUT/vbench.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Say what this machine and the model will get, and end; nothing is downloaded but settings."
        ),
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_show_list, help="Show every model and preset.")
    ] = False,
    version: Version = False,
) -> None:
    prepare_libraries()
    from psa_diffusers.runs.plan import make_plan
    from psa_diffusers.runs.request import Request

    plan = make_plan(
        Request(
            prompts=tuple(prompts or ()),
            preset=preset,
            density=density,
            preset_2=preset_2,
            compare=compare,
            output=output,
            seed=seed,
            samples=samples,
            fps=fps,
            compile=compiled,
            cuda_graphs=cuda_graphs,
            overwrite=overwrite,
            strict=strict,
            vbench=vbench,
            check=check,
            **options,
        )
    )
    if check:
        from psa_diffusers.runs.check.check import check_plan
        from psa_diffusers.runs.check.text import as_text

        typer.echo(as_text(check_plan(plan)))
        return
    _carry_out(plan, num_processes)


def _carry_out(plan: "Plan", num_processes: int) -> None:
    """Run the plan in this process, or in several; tell what was made and what is missing."""
    from psa_diffusers.runs.generate import Interrupted, run
    from psa_diffusers.runs.phases import as_line
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
        if place.reports:
            note(f"psa-generate: interrupted, {_how_to_go_on(plan, stop.summary, 'continue in ' + str(plan.output))}")
            print_json({**stop.summary, "status": "interrupted"})
        raise Stopped from None
    if summary is None:
        return
    if sys.stderr.isatty():
        for entry in summary["prompts"]:
            note(_figures(entry))
    if summary["denoising"] is not None and summary["denoising"]["not_faster"]:
        note(summary["denoising"]["not_faster"])
    if summary["made"] and summary["seconds"] is not None:
        note(as_line(summary["seconds"], plan.settings.device))
    note(f"report: {summary['report']}")
    print_json(summary)
    if summary["missing"]:
        note(f"psa-generate: {_how_to_go_on(plan, summary, 'make them')}")
        raise typer.Exit(FAILURE)


def _how_to_go_on(plan: "Plan", summary: dict[str, Any], purpose: str) -> str:
    again = "run the same command again" + (" without --overwrite" if plan.overwrite else "")
    return f"{summary['missing']} of {len(plan.prompts)} prompts missing; {again} to {purpose}"


def _figures(entry: dict[str, Any]) -> str:
    parts = [f"{name} {seconds:.1f} s" for name, seconds in entry["seconds"].items()]
    forms = {"density": "density {:.2f}", "psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "flicker": "flicker {:.1f}"}
    parts += [form.format(entry[key]) for key, form in forms.items() if entry[key] is not None]
    return f"{entry['folder']}: {', '.join(parts)}"


def generate() -> None:
    """Entry point of `psa-generate`."""
    sys.exit(run_command("psa-generate", generate_app))
