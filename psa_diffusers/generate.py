"""A run of `psa-generate`: every missing prompt through the pipeline, dense and sparse, and the files it leaves."""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from psa_diffusers import stopping
from psa_diffusers.compare import write_comparison
from psa_diffusers.environment import hardware, versions
from psa_diffusers.folder_lock import locked
from psa_diffusers.metrics import frame_faults
from psa_diffusers.overlay import attention_overlay
from psa_diffusers.panels import Label, write_image
from psa_diffusers.pipelines import current_flow_shift, load_pipeline
from psa_diffusers.report import write_report
from psa_diffusers.run_folder import PROMPT_FILE, REPORT_FILE, RunFolder, write_json
from psa_diffusers.settings import DENSE, Plan
from psa_diffusers.step_clock import StepClock
from psa_diffusers.vbench import FOLDER as VBENCH_FOLDER
from psa_diffusers.vbench import lay_out
from psa_diffusers.video import write_video
from psa_diffusers.workers import ALONE, Place

if TYPE_CHECKING:
    from psa_diffusers.masks import BlockMask, MaskRecorder
    from psa_diffusers.patching import PSAHandle
    from psa_diffusers.processor import PSAProcessor

OVERLAY = "attention.png"
MIDDLE = (0.5, 0.5, 0.5)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `summary` tells what is finished and how much is missing."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self.summary = summary
        super().__init__()


@dataclass
class Generated:
    """One video as it left the pipeline.

    Attributes:
        frames: float32 [frames, height, width, 3] in [0, 1].
        seconds: total, prepare (text encoding), denoise, decode, per_step and median_step.
        warnings: what is wrong with the frames, empty if nothing is.
        attention: what `RunStats.to_dict()` told, None for a dense run.
        masks: what a few layers read for the queries in the middle of the video; empty unless the run is compared.
    """

    frames: np.ndarray
    seconds: dict[str, Any]
    warnings: list[str]
    attention: dict[str, Any] | None = None
    peak_memory_gib: float | None = None
    masks: "list[BlockMask]" = field(default_factory=list)


def run(plan: Plan, place: Place = ALONE) -> dict[str, Any] | None:
    """Makes what is missing in the plan's folder and the report of all that is there; returns the summary.

    Of several processes each makes what no other has begun; the first one waits for the others and makes the report,
    if it is not left to the process that started them. The others return None.

    Raises:
        InputError: the folder holds something else, another run is writing there, or it cannot be written to. Nothing
            was loaded then.
        Interrupted: by Ctrl-C; finished prompts are kept, the rest left no files.
    """
    folder = RunFolder(plan.output, plan.settings.to_dict(), plan.prompts, place.launch)
    folder.check(plan.overwrite)
    try:
        # Processes that were started together hold single prompts, and who started them the folder.
        with locked(folder.path) if place is ALONE else contextlib.nullcontext():
            folder.check(plan.overwrite)  # another process may have worked there until now
            return _run(plan, folder, place)
    finally:
        folder.withdraw()


def _run(plan: Plan, folder: RunFolder, place: Place) -> dict[str, Any] | None:
    todo = folder.missing()
    try:
        if place.rank < len(todo):
            _make(plan, folder, todo, place)
    except KeyboardInterrupt:
        raise Interrupted(finish(plan, folder, todo) if place.reports else {}) from None
    except BaseException:
        with contextlib.suppress(Exception):  # what failed first is the one to tell
            if place.reports:
                finish(plan, folder, folder.missing())
        raise
    if not place.reports:
        return None
    folder.wait()
    return finish(plan, folder, todo)


def _make(plan: Plan, folder: RunFolder, todo: list[int], place: Place) -> None:
    settings = plan.settings
    started = time.perf_counter()
    pipe = load_pipeline(
        plan.model,
        dtype=settings.dtype,
        device=place.take_device(settings.device),
        offload=settings.offload,
        flow_shift=settings.flow_shift,
    )
    about = {
        "settings": {**settings.to_dict(), "flow_shift": current_flow_shift(pipe)},
        "versions": versions(),
        "hardware": hardware(settings.device),
        "load_seconds": time.perf_counter() - started,
    }
    folder.begin()
    for index in todo:
        stopping.check()
        with folder.claim(index) as mine:
            if mine:
                with folder.writing(index) as path:
                    _make_prompt(plan, pipe, index, path, about)


def _make_prompt(plan: Plan, pipe: Any, index: int, path: Path, about: dict[str, Any]) -> None:
    prompt, name, seed = plan.prompts[index], plan.name, plan.settings.seed + plan.sample(index)
    results: dict[str, Generated] = {}
    if plan.preset is None or plan.settings.compare:
        results[DENSE] = generate_video(pipe, plan, prompt, DENSE, seed)
    if plan.preset is not None:
        results[name] = _generate_sparse(pipe, plan, prompt, seed)
    report = {"prompt": prompt, "index": index, "seed": seed, "preset": plan.settings.preset}
    report["sample"] = plan.sample(index)
    report["runs"] = {key: _as_json(result) for key, result in results.items()}
    report["videos"] = {key: f"{key}.mp4" for key in results}
    report["files"] = {}
    for key, result in results.items():
        write_video(path / f"{key}.mp4", result.frames, plan.settings.fps)
        for warning in result.warnings:
            print(f"warning: {key}, {prompt[:60]!r}: {warning}", file=sys.stderr)
    if plan.settings.compare:
        labels = (_label(DENSE, results[DENSE]), _label(name, results[name]))
        comparison = write_comparison(path, results[DENSE].frames, results[name].frames, labels, plan.settings.fps)
        report["files"] = comparison.pop("files")
        if results[name].masks:
            write_image(path / OVERLAY, attention_overlay(results[name].frames, results[name].masks))
            report["files"]["attention"] = OVERLAY
        report["comparison"] = {**comparison, "speedup": _speedup(results[DENSE], results[name])}
    write_json(path / PROMPT_FILE, {**report, **about})


def _generate_sparse(pipe: Any, plan: Plan, prompt: str, seed: int) -> Generated:
    from psa_diffusers.processor import PSAFallbackWarning

    with warnings.catch_warnings(), _patched(pipe, plan) as psa:
        # Both are told below, with the number of calls.
        warnings.simplefilter("ignore", PSAFallbackWarning)
        warnings.filterwarnings("ignore", message=".*not finite with dense attention", category=RuntimeWarning)
        recorder = _watch(psa.processor) if plan.settings.compare else None
        result = generate_video(pipe, plan, prompt, plan.name, seed)
        result.masks = recorder.masks() if recorder else []
        result.attention = psa.stats().to_dict()
    steps = result.attention["density"]
    sparse = [index for index, row in enumerate(steps) if any(value is not None and value < 1 for value in row)]
    seconds = [value for index, value in enumerate(result.seconds["per_step"]) if index in sparse]
    result.seconds["sparse_steps"] = len(sparse)
    result.seconds["median_sparse_step"] = median(seconds) if seconds else None
    fallbacks = result.attention["fallbacks"]
    if not sparse:
        reason = "" if fallbacks else ": every step is in the dense phase"
        result.warnings.append(f"attention was dense throughout{reason}")
    result.warnings += [f"{count} attention calls ran dense: {reason}" for reason, count in fallbacks.items()]
    result.warnings += [
        f"{layer}: sparse attention was not finite at step {', '.join(str(step + 1) for step in at)}; dense there"
        for layer, at in result.attention["not_finite"].items()
    ]
    if result.attention["model_not_finite"]:
        result.warnings.append(result.attention["model_not_finite"])
    return result


def _patched(pipe: Any, plan: Plan) -> "PSAHandle":
    from psa_diffusers import apply_psa

    return apply_psa(pipe, plan.preset, preset_2=plan.preset_2, strict=plan.settings.strict)


def _watch(processor: "PSAProcessor") -> "MaskRecorder":
    """Record the first, the middle and the last layer of each transformer, in the middle of the sparse steps."""
    from psa_diffusers.masks import MaskRecorder

    layers = processor.stats().layers
    count = len(layers) // len(processor.presets)
    chosen = {first + at for first in range(0, len(layers), count) for at in (0, count // 2, count - 1)}
    recorder = MaskRecorder([layers[index] for index in sorted(chosen)], point=MIDDLE)
    processor.record_masks(recorder)
    return recorder


def generate_video(
    pipe: Any, plan: Plan, prompt: str, name: str, seed: int, after_step: Callable[[int], None] | None = None
) -> Generated:
    """Runs the pipeline once. The noise is drawn on the CPU, so that a seed means the same video on every device.

    Args:
        name: what the progress bar calls the run.
        after_step: told the number of each step, from 0, when it is done; may raise to end the run.
    """
    (result,) = generate_videos(pipe, plan, (prompt,), name, (seed,), after_step)
    return result


def generate_videos(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[str],
    name: str,
    seeds: Sequence[int],
    after_step: Callable[[int], None] | None = None,
) -> list[Generated]:
    """`generate_video` for several prompts at once, each with its seed; seconds and memory are those of all of them."""
    import torch

    settings, negative = plan.settings, plan.settings.negative_prompt
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    one = len(prompts) == 1  # given plainly, as some pipelines take no lists
    arguments: dict[str, Any] = {
        "prompt": prompts[0] if one else list(prompts),
        "negative_prompt": negative if one or negative is None else [negative] * len(prompts),
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.frames,
        "num_inference_steps": settings.steps,
        "generator": generators[0] if one else generators,
        "output_type": "np",
    }
    kind, clock = plan.model.kind, StepClock(settings.device)

    def step_done(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        stopping.check()
        if after_step is not None:
            after_step(index)
        return clock.step(pipe, index, timestep, values)

    if kind.guider:
        pipe.guider = pipe.guider.new(guidance_scale=settings.guidance)
    else:
        arguments |= {"guidance_scale": settings.guidance, "callback_on_step_end": step_done}
    if settings.guidance_2 is not None:
        arguments["guidance_scale_2"] = settings.guidance_2
    if plan.image is not None:
        arguments["image" if kind.image == "first" else "reference_images"] = plan.image
    title = prompts[0] if len(prompts[0]) <= 40 else prompts[0][:37] + "..."
    pipe.set_progress_bar_config(desc=f"{name}: {title}", disable=not sys.stderr.isatty())
    with clock.watching(pipe), clock.following_scheduler(pipe, step_done) if kind.guider else contextlib.nullcontext():
        videos = [np.asarray(frames, np.float32) for frames in pipe(**arguments).frames]
    stopping.check()
    latents = [] if clock.finite else ["the latents hold values that are not finite"]
    seconds, memory = clock.seconds(), clock.peak_memory_gib()
    return [Generated(video, seconds, latents + frame_faults(video), peak_memory_gib=memory) for video in videos]


def _as_json(result: Generated) -> dict[str, Any]:
    return {
        "seconds": result.seconds,
        "warnings": result.warnings,
        "attention": result.attention,
        "peak_memory_gib": result.peak_memory_gib,
    }


def _label(name: str, result: Generated) -> Label:
    facts = [f"{result.seconds['total']:.1f} s"]
    if result.attention is not None:
        facts.append(f"density {result.attention['density_run']:.2f}")
    return Label(name, tuple(facts))


def _speedup(dense: Generated, sparse: Generated) -> dict[str, float | None]:
    step = sparse.seconds["median_sparse_step"]
    return {
        "total": dense.seconds["total"] / sparse.seconds["total"],
        "denoise": dense.seconds["denoise"] / sparse.seconds["denoise"],
        "sparse_step": dense.seconds["median_step"] / step if step else None,
    }


def finish(plan: Plan, folder: RunFolder, todo: list[int]) -> dict[str, Any]:
    """Writes the report of what is finished and sums it up; `todo` is what was missing before."""
    reports = folder.finished()
    missing = len(plan.prompts) - len(reports)
    made = len(set(todo) - set(folder.missing()))
    if reports:
        write_report(folder.path, reports, missing=missing)
        if plan.vbench:
            lay_out(folder.path, reports)
    return {
        "status": "complete" if not missing else "incomplete",
        "output": str(folder.path),
        "report": str(folder.path / REPORT_FILE) if reports else None,
        "vbench": str(folder.path / VBENCH_FOLDER) if reports and plan.vbench else None,
        "model": plan.settings.model,
        "preset": plan.settings.preset,
        "seed": plan.settings.seed,
        "made": made,
        "kept": len(reports) - made,
        "missing": missing,
        "prompts": [_summary(report) for report in reports],
    }


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    runs = report["runs"]
    attention = next((entry["attention"] for entry in runs.values() if entry["attention"]), None)
    comparison = report.get("comparison", {})
    return {
        "prompt": report["prompt"],
        "folder": report["folder"],
        "seed": report["seed"],
        "seconds": {name: entry["seconds"]["total"] for name, entry in runs.items()},
        "density": attention["density_run"] if attention else None,
        "psnr": comparison["psnr"]["mean"] if comparison else None,
        "ssim": comparison["ssim"]["mean"] if comparison else None,
        "vmaf": comparison["vmaf"]["mean"] if "vmaf" in comparison else None,
        "speedup": comparison["speedup"]["total"] if comparison else None,
        "warnings": [f"{name}: {warning}" for name, entry in runs.items() for warning in entry["warnings"]],
    }
