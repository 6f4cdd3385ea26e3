"""Options that several commands have, each defined once: what a pipeline is called with, and where it runs."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer


def _show_version(wanted: bool) -> None:
    if wanted:
        from psa_diffusers.environment import versions

        typer.echo(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit


OWN_DEFAULT, PLACE = "The model's own defaults", "Where it runs"

ModelName = Annotated[str, typer.Option(help="Alias (see psa-generate --list), hub id, or folder of a saved pipeline.")]
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
Seed = Annotated[int, typer.Option(help="Seed of the noise, the same for every prompt, dense and sparse.")]
FirstFrame = Annotated[
    str | None, typer.Option(metavar="FILE", help="First frame, for image-to-video models; for VACE a reference.")
]
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

# What a pipeline's run has, whichever command makes it: fields of `Request` with the option and the default of each.
RUN_OPTIONS: dict[str, tuple[Any, Any]] = {
    "model": (ModelName, "demo"),
    "steps": (Steps, None),
    "guidance": (Guidance, None),
    "height": (Height, None),
    "width": (Width, None),
    "frames": (Frames, None),
    "negative_prompt": (NegativePrompt, None),
    "dtype": (Dtype, "auto"),
    "device": (Device, "auto"),
    "offload": (Offload, "none"),
    "image": (FirstFrame, None),
    "lora": (Lora, None),
    "lora_2": (Lora2, None),
}
LISTS = ("lora", "lora_2")


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `RUN_OPTIONS` in place of its parameter `options`, which gets them as arguments of `Request`."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        options = {name: given.pop(name) for name in RUN_OPTIONS}
        command(**given, options={**options, **{name: tuple(options[name] or ()) for name in LISTS}})

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        own = [(parameter.name, parameter.annotation, parameter.default)]
        shared = [(name, kind, default) for name, (kind, default) in RUN_OPTIONS.items()]
        for name, kind, default in shared if parameter.name == "options" else own:
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(name, keyword, default=default, annotation=kind))
    # What typer reads.
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
