"""Options that several commands have: what a pipeline is called with, and where it runs."""

from typing import Annotated

import typer


def _show_version(wanted: bool) -> None:
    if wanted:
        from psa_diffusers.environment import versions

        typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


OWN_DEFAULT, PLACE = "The model's own defaults", "Where it runs"

ModelName = Annotated[str, typer.Option(help="Alias (see psa-generate --list), hub id, or folder.")]
Density = Annotated[
    float | None,
    typer.Option(
        help="What attention may cost, as a share of dense attention (0.25 is a quarter): the preset at this density."
    ),
]
# Each by a short name and by that of diffusers' pipelines.
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.", rich_help_panel=OWN_DEFAULT)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", "--guidance-scale", help="Guidance scale (of both experts).", rich_help_panel=OWN_DEFAULT
    ),
]
Height = Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=OWN_DEFAULT)]
Width = Annotated[int | None, typer.Option(help="Pixels.", rich_help_panel=OWN_DEFAULT)]
Frames = Annotated[
    int | None,
    typer.Option("--frames", "--num-frames", help="Frames, for most models 4k+1.", rich_help_panel=OWN_DEFAULT),
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What the video should not show.", rich_help_panel=OWN_DEFAULT)
]
Dtype = Annotated[
    str, typer.Option(help="auto, bfloat16, float16 or float32; the VAE is float32.", rich_help_panel=PLACE)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", rich_help_panel=PLACE)]
Offload = Annotated[
    str,
    typer.Option(help="none, model (one component on the GPU at a time) or group (one layer).", rich_help_panel=PLACE),
]
FirstFrame = Annotated[str | None, typer.Option(metavar="FILE", help="First frame, for image-to-video models.")]
LORA = "PATH|HUB_ID[:WEIGHT]"
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar=LORA,
        help="LoRA: a safetensors file, a folder or a hub repository with one, or owner/name/file.safetensors; "
        "several add up. In both transformers where there are two.",
    ),
]
Lora2 = Annotated[
    list[str] | None,
    typer.Option(metavar=LORA, help="LoRA for the second of two transformers; --lora is then for the first alone."),
]
Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show versions.")]
