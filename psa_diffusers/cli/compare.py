"""The command `psa-compare`. What is heavy is imported inside, so that --help answers at once."""

import sys
from typing import Annotated

import typer

from psa_diffusers.cli.options import Version
from psa_diffusers.cli.shell import new_app, note, print_json, run_command

COMPARE_HELP = """Compare two videos of one size and length: side by side, PSNR, SSIM and flicker, in one report.html.

[bold]Example[/bold]

  psa-compare dense.mp4 psa-3.mp4 --output comparison

The first video is the reference. The last line on stdout is one JSON document.
"""

compare_app = new_app()


@compare_app.command(help=COMPARE_HELP, no_args_is_help=True)
def _compare(
    reference: Annotated[str, typer.Argument(metavar="A.mp4", help="The reference, such as the dense video.")],
    other: Annotated[str, typer.Argument(metavar="B.mp4", help="The video to compare with it.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")] = False,
    version: Version = False,
) -> None:
    from psa_diffusers.report.compare import compare_files

    summary = compare_files(reference, other, output, overwrite)
    note(f"report: {summary['report']}")
    print_json(summary)


def compare() -> None:
    """Entry point of `psa-compare`."""
    sys.exit(run_command("psa-compare", compare_app))


if __name__ == "__main__":
    compare()
