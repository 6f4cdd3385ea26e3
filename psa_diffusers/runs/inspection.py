"""`psa-inspect`: the block mask of one layer, head and denoising step of a run, which ends after that step."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.errors import InputError
from psa_diffusers.files import check_name, check_output, partial_path
from psa_diffusers.report.mask_plot import coverage, level_names, require_matplotlib, write_mask_plot
from psa_diffusers.runs import stopping
from psa_diffusers.runs.pipeline_call import generate_video
from psa_diffusers.runs.plan import Plan
from psa_diffusers.runs.ranges import ranges

if TYPE_CHECKING:
    from psa_presets import Preset


class _EnoughSeen(BaseException):
    """The step that was asked for is done, so the run can end. No Exception, because modular pipelines log those."""


@dataclass(frozen=True)
class MaskPlace:
    """Which attention to look at. `layer` and `head` count from 0, `step` from 1; None means the middle one.

    If there are two transformers, `layer` counts through both.
    """

    layer: int | None = None
    head: int = 0
    step: int | None = None


@stopping.carried_out()
def inspect_run(plan: Plan, place: MaskPlace, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run the pipeline up to the step and draw its mask; return the summary.

    Raises:
        InputError: the plan is dense or has several prompts, there is no such layer, head or step, the preset keeps it
            dense, or the output file exists already or cannot be written. Nothing has run then.
        PSAFallbackError: attention would be dense there, for the reason that it says.
    """
    require_matplotlib()
    preset, index, step = _check(plan, place, output, overwrite)
    settings = plan.settings
    pipe = load_pipeline(
        plan.model,
        dtype=settings.dtype,
        device=settings.device,
        offload=settings.offload,
        flow_shift=settings.flow_shift,
        loras=plan.loras,
    )
    from psa_diffusers.patch.apply import apply_psa
    from psa_diffusers.patch.dense_reasons import PSAFallbackError
    from psa_diffusers.patch.masks import MaskRecorder

    try:
        with apply_psa(pipe, preset, strict=True) as psa:
            layer = psa.stats().layers[index]
            recorder = MaskRecorder([layer], step=step, head=place.head)
            psa.processor.record_masks(recorder)

            def stop(done: int) -> None:
                if done >= step:
                    raise _EnoughSeen

            with contextlib.suppress(_EnoughSeen):
                generate_video(pipe, plan, plan.prompts[0], f"up to step {step + 1}", settings.seed, after_step=stop)
            masks = recorder.masks()
    except PSAFallbackError as error:
        raise InputError(f"there is no mask to draw: {str(error).removeprefix('strict: ')}") from None
    if not masks:
        raise InputError(f"--layer {index}: {layer} did not run at step {step + 1}; two experts take turns")
    mask = masks[0]
    if not len(mask.levels):
        raise InputError(f"--head {place.head}: {layer} has no such head; they count from 0")
    write_mask_plot(output, mask, plan.prompts[0])
    return {
        "output": str(output),
        "layer": mask.layer,
        "head": place.head,
        "step": step + 1,
        "steps": mask.steps,
        "grid": list(mask.grid),
        "query_blocks": mask.levels.shape[1],
        "key_blocks": mask.levels.shape[2],
        "density": float(mask.detail().mean()),
        "coverage": coverage(mask),
        "shares": dict(zip(level_names(mask), mask.shares(), strict=True)),
    }


def _check(plan: Plan, place: MaskPlace, output: Path, overwrite: bool) -> "tuple[Preset, int, int]":
    """The preset, and the layer and the step, both counted from 0."""
    from psa_diffusers.patch.masks import middle_sparse_step

    if plan.preset is None:
        raise InputError("--preset dense: dense attention has no block mask; give a sparse preset")
    if len(plan.prompts) != 1:
        raise InputError(f"{len(plan.prompts)} prompts given; give one")
    check_name("--output", output, partial_path(output))
    if output.is_dir():
        raise InputError(f"--output {output}: it is a folder; name the PNG to write")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: is already there; choose another name or add --overwrite")
    per_expert, steps = plan.model.num_layers, plan.steps
    count = per_expert * plan.model.experts
    index = count // 2 if place.layer is None else place.layer
    if not 0 <= index < count:
        raise InputError(f"--layer {index}: {plan.model.name} has the layers 0 to {count - 1}")
    heads = plan.model.num_heads
    if place.head < 0 or (heads is not None and place.head >= heads):
        known = "heads count from 0" if heads is None else f"{plan.model.name} has the heads 0 to {heads - 1}"
        raise InputError(f"--head {place.head}: {known}")
    sparse = plan.preset.sparse_steps(steps)
    if not sparse:
        raise InputError(f"--steps {plan.settings.steps}: with {plan.preset.name} all of them are dense")
    step = middle_sparse_step(plan.preset, steps) if place.step is None else place.step - 1
    if step not in sparse:
        dense = f"{steps - len(sparse)} of {steps} are dense with {plan.preset.name}"
        if sparse == tuple(range(sparse[0], steps)):
            dense = f"the first {dense}"
        raise InputError(
            f"--step {step + 1}: the sparse steps of this run are {ranges([at + 1 for at in sparse])} ({dense})"
        )
    if plan.preset.layer_specs(per_expert, plan.preset.step_rules_at(step, steps))[index % per_expert] is None:
        raise InputError(f"--layer {index}: {plan.preset.name} keeps this layer dense")
    check_output(output, output.parent)
    return plan.preset, index, step
