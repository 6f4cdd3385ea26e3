"""The arguments of a pipeline's call: a plan's settings, under the names that the pipeline's class has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psa_diffusers.errors import InputError
from psa_diffusers.runs.pipeline_output import wanted_outputs
from psa_diffusers.runs.plan import Plan


def call_arguments(
    pipe: Any, plan: Plan, prompts: Sequence[str], seeds: Sequence[int], step_done: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """The arguments of the call. If guidance is a component of the pipeline, it is set there.

    The noise is drawn on the CPU, so that a seed gives the same video on every device.

    Args:
        step_done: callback after each step, for pipelines that take one.

    Raises:
        InputError: a modular pipeline has no input of one of the names.
    """
    import torch

    kind, settings = plan.model.kind, plan.settings
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    one = len(prompts) == 1  # given plainly, as some pipelines take no lists
    arguments: dict[str, Any] = {
        "prompt": prompts[0] if one else list(prompts),
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "generator": generators[0] if one else generators,
        "output_type": "np",
    }
    if kind.image_size is None:
        arguments |= {"height": settings.height, "width": settings.width}
    if kind.guided:
        negative = settings.negative_prompt
        arguments["negative_prompt"] = negative if one or negative is None else [negative] * len(prompts)
    if kind.guider:
        pipe.guider = pipe.guider.new(guidance_scale=settings.guidance)
    elif kind.guided:
        arguments["guidance_scale"] = settings.guidance
    if not (kind.guider or kind.modular):
        arguments["callback_on_step_end"] = step_done
    if settings.guidance_2 is not None:
        arguments["guidance_scale_2"] = settings.guidance_2
    if kind.frame_rate is not None:
        arguments[kind.frame_rate] = settings.fps
    if plan.image is not None:
        arguments["image" if kind.begins_with_image else "reference_images"] = plan.image
    arguments |= settings.arguments
    if kind.modular:
        _check_inputs(pipe, arguments)
        arguments["output"] = wanted_outputs(kind)
    return arguments


def _check_inputs(pipe: Any, arguments: dict[str, Any]) -> None:
    """Refuse arguments that a modular pipeline does not know: it would only warn, and leave them out."""
    known = {spec.name for spec in pipe.blocks.inputs}
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise InputError(f"{type(pipe).__name__} has no input {unknown[0]}, so it cannot do what was asked for")
