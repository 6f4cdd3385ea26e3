"""The command `psa-inspect`. What is heavy is imported inside, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from psa_diffusers.cli.options import Density, Seed, Version, with_run_options
from psa_diffusers.cli.shell import new_app, note, prepare_libraries, print_json, run_command

INSPECT_HELP = """Draw which key blocks each query block reads, and how finely: one layer, one head, one denoising step.

[bold]Example[/bold]

  psa-inspect --preset psa-3 --layer 3 --head 0 --step 8 "a large red circle moving right" --output mask.png

The run ends after that step. Needs matplotlib: pip install 'psa-diffusers\\[plots]'. The last line on stdout
is one JSON document with density and coverage.
"""

inspect_app = new_app()


@inspect_app.command(help=INSPECT_HELP, no_args_is_help=True)
@with_run_options
def _inspect(
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT|FILE", help="One prompt, or a text file or pipe that holds one; - is stdin."),
    ],
    options: dict[str, Any],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Name (see psa-generate --list) or path of a YAML file "
            "[dim](default: psa-3, with --density psa-auto)[/dim]."
        ),
    ] = None,
    density: Density = None,
    layer: Annotated[
        int | None, typer.Option(help="Self-attention layer, from 0 [dim](default: the middle one)[/dim].")
    ] = None,
    head: Annotated[int, typer.Option(help="Attention head, from 0.")] = 0,
    step: Annotated[
        int | None, typer.Option(help="Denoising step, from 1 [dim](default: the middle sparse one)[/dim].")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The PNG to write.")] = "mask.png",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    seed: Seed = 0,
    version: Version = False,
) -> None:
    prepare_libraries()
    from psa_diffusers.errors import InputError
    from psa_diffusers.runs.plan import make_plan
    from psa_diffusers.runs.request import Request

    if Path(output).suffix.lower() != ".png":
        raise InputError(f"--output {output}: must end in .png")
    plan = make_plan(Request(prompts=(prompt,), preset=preset, density=density, seed=seed, **options))
    from psa_diffusers.runs.inspection import MaskPlace, inspect_run

    summary = inspect_run(plan, MaskPlace(layer, head, step), Path(output), overwrite)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in summary["shares"].items())
    note(f"{summary['layer']}, head {head}, step {summary['step']} of {summary['steps']}: {shares}")
    note(f"density {summary['density']:.3f}, coverage {summary['coverage']:.3f}; picture: {summary['output']}")
    print_json(summary)


def inspect() -> None:
    """Entry point of `psa-inspect`."""
    sys.exit(run_command("psa-inspect", inspect_app))


if __name__ == "__main__":
    inspect()
