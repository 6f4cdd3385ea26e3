"""The command `psa-calibrate`. What is heavy is imported inside, so that --help answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from psa_diffusers.cli.options import (
    Device,
    Dtype,
    FirstFrame,
    Frames,
    Guidance,
    Height,
    Lora,
    Lora2,
    ModelName,
    NegativePrompt,
    Offload,
    Steps,
    Version,
    Width,
)
from psa_diffusers.cli.shell import new_app, note, prepare_libraries, print_json, run_command

CALIBRATE_HELP = """Make a preset for your model: find the order and blocks that suit it, meet a target, verify it.

[bold]Examples[/bold]

  psa-calibrate --prompts prompts.txt --density 0.2 --output mine.yaml
  psa-calibrate --model wan --prompts prompts.txt --target-psnr 25 --output wan-25db.yaml
  psa-calibrate --model wan2.2-14b --prompts prompts.txt --speedup 1.8 --output wan22.yaml

The last prompts of the file are held out to verify on. What was measured is kept in a folder beside the output, so
the same command continues where it was stopped, and another target of the same settings costs only its own runs. The
last line on stdout is one JSON document.
"""

calibrate_app = new_app()


@calibrate_app.command(help=CALIBRATE_HELP, no_args_is_help=True)
def _calibrate(
    prompts: Annotated[str, typer.Option(metavar="FILE", help="One prompt a line ('#' comments); - is stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The YAML file to write.")],
    target_psnr: Annotated[float | None, typer.Option(help="Target: dB against the dense videos.")] = None,
    density: Annotated[float | None, typer.Option(help="Target: density of the sparse steps, 0 to 1.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Target: of denoising, on this machine.")] = None,
    model: ModelName = "demo",
    base_preset: Annotated[str, typer.Option(help="What shapes are variations of; its dense steps stay.")] = "psa-auto",
    held_out: Annotated[int, typer.Option(help="How many of the last prompts to verify on.")] = 2,
    verify: Annotated[
        str | None, typer.Option(metavar="FILE", help="Other prompts to verify on, instead of the last ones.")
    ] = None,
    max_prompts: Annotated[
        int, typer.Option(help="Measure on at most so many prompts, the first ones; at least 4.")
    ] = 4,
    measured_steps: Annotated[int, typer.Option(help="At how many denoising steps to measure.")] = 3,
    batch: Annotated[int, typer.Option(help="Videos to make at once: faster where memory allows.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Drop earlier measurements and replace the output.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise; the next has one more.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    negative_prompt: NegativePrompt = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    offload: Offload = "none",
    image: FirstFrame = None,
    lora: Lora = None,
    lora_2: Lora2 = None,
    version: Version = False,
) -> None:
    prepare_libraries()
    from psa_diffusers.calibrate.calibration import calibrate
    from psa_diffusers.calibrate.plan import Calibration
    from psa_diffusers.calibrate.prompts import split_prompts
    from psa_diffusers.calibrate.targets import one_target
    from psa_diffusers.errors import InputError
    from psa_diffusers.runs.plan import make_plan
    from psa_diffusers.runs.request import Request

    if not 1 <= measured_steps <= 100:
        raise InputError(f"--measured-steps {measured_steps}: must be from 1 to 100")
    if batch < 1:
        raise InputError(f"--batch {batch}: must be 1 or more")
    measured, held = split_prompts(prompts, verify, held_out, max_prompts)
    try:
        plan = make_plan(
            Request(
                prompts=measured,
                literal=True,
                model=model,
                preset=base_preset,
                seed=seed,
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                frames=frames,
                negative_prompt=negative_prompt,
                dtype=dtype,
                device=device,
                offload=offload,
                image=image,
                lora=tuple(lora or ()),
                lora_2=tuple(lora_2 or ()),
            )
        )
    except InputError as error:
        raise InputError(str(error).replace("--preset ", "--base-preset ", 1)) from error
    dense_share = 0.0
    if plan.preset is not None:
        count = plan.steps
        dense_share = (count - len(plan.preset.sparse_steps(count))) / count
    target = one_target(target_psnr, density, speedup, dense_share)
    calibration = Calibration(plan, held, target, measured_steps, Path(output), overwrite, batch)
    summary = calibrate(calibration, note)
    if not summary["met"]:
        note(f"psa-calibrate: the held-out prompts do not meet the target ({summary['target']}); see above")
    print_json(summary)


def calibrate() -> None:
    """Entry point of `psa-calibrate`."""
    sys.exit(run_command("psa-calibrate", calibrate_app))


if __name__ == "__main__":
    calibrate()
