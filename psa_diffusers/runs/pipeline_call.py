"""One call of the pipeline: from one or more prompts to videos, dense or sparse, with their times and their faults."""

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from psa_diffusers.checkpoints.modular import set_progress_bars
from psa_diffusers.report.metrics import frame_faults
from psa_diffusers.report.sound import Sound, sound_faults
from psa_diffusers.runs import stopping
from psa_diffusers.runs.pipeline_arguments import call_arguments
from psa_diffusers.runs.pipeline_output import read_output
from psa_diffusers.runs.plan import Plan
from psa_diffusers.runs.progress import StepLog
from psa_diffusers.runs.step_clock import StepClock, step_count

if TYPE_CHECKING:
    from psa_diffusers.patch.apply import PSAHandle
    from psa_diffusers.patch.masks import BlockMask, MaskRecorder
    from psa_diffusers.patch.processor import PSAProcessor
    from psa_presets import Preset

MIDDLE = (0.5, 0.5, 0.5)
AGAIN = "warning: {name}: a CUDA graph gave values that are not finite; the video is made again without graphs"


@dataclass
class Generated:
    """One video as it left the pipeline.

    Attributes:
        frames: float32 [frames, height, width, 3] in [0, 1].
        seconds: total, prepare (text encoding), denoise, decode, per_step and median_step; of a sparse run also
            sparse_steps and dense_steps, the number of each, median_sparse_step, and dense_share, the share of the
            time of all steps that the dense ones took.
        warnings: what is wrong with the frames and the sound; empty if nothing is.
        attention: `RunStats.to_dict()`; None for a dense run.
        masks: which keys a few layers read for the queries in the middle of the video; empty unless runs are compared.
        sound: the sound that belongs to the frames; None if the pipeline makes none.
    """

    frames: np.ndarray
    seconds: dict[str, Any]
    warnings: list[str]
    attention: dict[str, Any] | None = None
    peak_memory_gib: float | None = None
    masks: "list[BlockMask]" = field(default_factory=list)
    sound: Sound | None = None


def generate_video(
    pipe: Any, plan: Plan, prompt: str, name: str, seed: int, after_step: Callable[[int], None] | None = None
) -> Generated:
    """Run the pipeline once. The noise is drawn on the CPU, so that a seed gives the same video on every device.

    Args:
        name: the run's name in the progress bar, or in the lines of a log.
        after_step: called with the number of each finished step, from 0; may raise to end the run.
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
    """`generate_video` for several prompts at once, each with its seed. Seconds and memory are for all together."""
    settings, kind, clock, log = plan.settings, plan.model.kind, StepClock(plan.settings.device), StepLog(name)

    def step_done(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        stopping.check()
        if after_step is not None:
            after_step(index)
        log.done(index, step_count(pipe))
        return clock.step(pipe, index, timestep, values)

    arguments = call_arguments(pipe, plan, prompts, seeds, step_done)
    title = prompts[0] if len(prompts[0]) <= 40 else prompts[0][:37] + "..."
    bars = partial(set_progress_bars, pipe) if kind.modular else pipe.set_progress_bar_config
    bars(desc=f"{name}: {title}", disable=not sys.stderr.isatty())
    told = "callback_on_step_end" in arguments
    with clock.watching(pipe), contextlib.nullcontext() if told else clock.following_scheduler(pipe, step_done):
        videos = read_output(pipe, kind, pipe(**arguments))
    stopping.check()
    latents = [] if clock.finite else ["the latents hold values that are not finite"]
    seconds, memory = clock.seconds(), clock.peak_memory_gib()
    results = []
    for frames, sound in videos:
        faults = latents + frame_faults(frames)
        if sound is not None:
            faults += sound_faults(sound, len(frames) / settings.fps)
        results.append(Generated(frames, seconds, faults, peak_memory_gib=memory, sound=sound))
    return results


def generate_sparse(pipe: Any, plan: Plan, preset: "Preset", prompt: str, seed: int) -> Generated:
    """Run the pipeline once with a preset. Add what was attended, and warnings about what was not done as asked."""
    from psa_diffusers.patch.dense_reasons import PSAFallbackWarning

    with warnings.catch_warnings(), _patched(pipe, plan, preset) as psa:
        # Silenced, because both are reported below, with the number of calls.
        warnings.simplefilter("ignore", PSAFallbackWarning)
        warnings.filterwarnings("ignore", message=".*not finite with dense attention", category=RuntimeWarning)
        recorder = _watch(psa.processor) if plan.settings.compare else None
        result = generate_video(pipe, plan, prompt, plan.name, seed)
        if not psa.processor.replays_were_finite():
            print(AGAIN.format(name=plan.name), file=sys.stderr, flush=True)
            result = generate_video(pipe, plan, prompt, plan.name, seed)
        result.masks = recorder.masks() if recorder else []
        stats = psa.stats()
    result.attention = stats.to_dict()
    per_step = result.seconds["per_step"]
    dense, sparse = (
        [took for index, took in enumerate(per_step) if index in steps] for steps in (stats.dense_at, stats.sparse_at)
    )
    result.seconds["sparse_steps"] = len(stats.sparse_at)
    result.seconds["median_sparse_step"] = median(sparse) if sparse else None
    result.seconds["dense_steps"] = len(stats.dense_at)
    result.seconds["dense_share"] = sum(dense) / sum(per_step) if sum(per_step) else None
    fallbacks = stats.fallbacks
    if not stats.sparse_at:
        reason = "" if fallbacks else ": every step is in the dense phase"
        result.warnings.append(f"attention was dense throughout{reason}")
    result.warnings += [f"{count} attention calls ran dense: {reason}" for reason, count in fallbacks.items()]
    result.warnings += [
        f"{layer}: sparse attention was not finite at step {', '.join(str(step + 1) for step in at)}; dense there"
        for layer, at in stats.not_finite.items()
    ]
    if stats.model_not_finite:
        result.warnings.append(stats.model_not_finite)
    return result


def _patched(pipe: Any, plan: Plan, preset: "Preset") -> "PSAHandle":
    from psa_diffusers.patch.apply import apply_psa

    return apply_psa(pipe, preset, preset_2=plan.preset_2, strict=plan.settings.strict)


def _watch(processor: "PSAProcessor") -> "MaskRecorder":
    """Record the first, the middle and the last layer of each transformer, in the middle of the sparse steps."""
    from psa_diffusers.patch.masks import MaskRecorder

    layers = processor.stats().layers
    count = len(layers) // len(processor.presets)
    chosen = {first + at for first in range(0, len(layers), count) for at in (0, count // 2, count - 1)}
    recorder = MaskRecorder([layers[index] for index in sorted(chosen)], point=MIDDLE)
    processor.record_masks(recorder)
    return recorder
