"""A run of `psa-generate`: generates every missing prompt, dense and sparse, and writes the files."""

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from psa_diffusers.checkpoints.load import current_flow_shift, import_pipeline, load_pipeline
from psa_diffusers.environment import hardware, versions
from psa_diffusers.files import PROMPT_FILE, REPORT_FILE, write_json
from psa_diffusers.report.compare import write_comparison
from psa_diffusers.report.html import write_report
from psa_diffusers.report.overlay import attention_overlay
from psa_diffusers.report.panels import Label, write_image
from psa_diffusers.report.video import write_video
from psa_diffusers.runs import stopping
from psa_diffusers.runs.compiled import compile_transformers
from psa_diffusers.runs.folder import RunFolder, sizes
from psa_diffusers.runs.folder_lock import locked
from psa_diffusers.runs.forward_graphs import replay_forwards
from psa_diffusers.runs.gain import denoising, settled_seconds
from psa_diffusers.runs.phases import Phases, as_rows, first_calls
from psa_diffusers.runs.pipeline_call import Generated, generate_sparse, generate_video
from psa_diffusers.runs.plan import DENSE, Plan
from psa_diffusers.runs.progress import FILES, Progress, duration, tell
from psa_diffusers.runs.rank import ALONE, Place
from psa_diffusers.runs.vbench import FOLDER as VBENCH_FOLDER
from psa_diffusers.runs.vbench import lay_out

OVERLAY = "attention.png"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `summary` says what is finished and how much is missing."""

    def __init__(self, summary: dict[str, Any]) -> None:
        self.summary = summary
        super().__init__()


def run(plan: Plan, place: Place = ALONE) -> dict[str, Any] | None:
    """Make what is missing in the plan's folder, and the report of everything there; return the summary.

    Several processes share the work: each makes prompts that no other has begun. The first process waits for the others
    and makes the report, unless their parent makes it. The others return None.

    Raises:
        InputError: the folder holds something else, another run is writing there, or it cannot be written to. Nothing
            was loaded then.
        Interrupted: by Ctrl-C. Finished prompts are kept, the others have left no files.
    """
    folder = RunFolder(plan.output, plan.settings.to_dict(), plan.prompts, place.launch)
    folder.check(plan.overwrite)
    try:
        # Workers lock single prompts, their parent the folder.
        with locked(folder.path) if place is ALONE else contextlib.nullcontext():
            folder.check(plan.overwrite)  # another process may have worked there until now
            return _run(plan, folder, place)
    finally:
        folder.withdraw()


def _run(plan: Plan, folder: RunFolder, place: Place) -> dict[str, Any] | None:
    todo, phases = folder.missing(), Phases(plan.seconds)
    try:
        if place.rank < len(todo):
            _make(plan, folder, todo, place, phases)
    except KeyboardInterrupt:
        raise Interrupted(finish(plan, folder, todo, phases) if place.reports else {}) from None
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to raise
            if place.reports:
                finish(plan, folder, folder.missing())
        raise
    if not place.reports:
        return None
    folder.wait()
    return finish(plan, folder, todo, phases)


@stopping.carried_out()
def _make(plan: Plan, folder: RunFolder, todo: list[int], place: Place, phases: Phases) -> None:
    settings, told = plan.settings, list[str]()
    started = time.perf_counter()
    with phases.phase("imports"):
        import_pipeline(plan.model)
    with phases.phase("loading"):
        pipe = load_pipeline(
            plan.model,
            dtype=settings.dtype,
            device=place.take_device(settings.device),
            offload=settings.offload,
            flow_shift=settings.flow_shift,
            loras=plan.loras,
            tell=told.append,
        )
        if settings.compile:
            compile_transformers(pipe)
        if settings.cuda_graphs:
            replay_forwards(pipe)
    for line in told:
        print(f"warning: {line}", file=sys.stderr)
    seconds = time.perf_counter() - started
    about = {
        "settings": {**settings.to_dict(), "flow_shift": current_flow_shift(pipe)},
        "versions": versions(),
        "hardware": hardware(settings.device),
        "load_seconds": seconds,
    }
    if told:
        about["warnings"] = told
    tell(f"{plan.model.name} is loaded, in {duration(seconds)}")
    folder.begin()
    progress = Progress(len(todo), _videos(plan), place.ranks)
    for number, index in enumerate(todo):
        stopping.check()
        with folder.claim(index) as mine:
            if mine:
                with folder.writing(index) as path:
                    results = _make_videos(plan, pipe, index, partial(progress.stage, number))
                    for result in results.values():
                        phases.add_video(result.seconds, _dense_at(result))
                    with progress.stage(number, FILES), phases.phase("files"):
                        _write_prompt(plan, index, results, path, about)


def _videos(plan: Plan) -> list[str]:
    """The names of each prompt's videos, in the order in which they are made."""
    dense = [DENSE] if plan.preset is None or plan.settings.compare else []
    return dense if plan.preset is None else [*dense, plan.name]


def _make_videos(plan: Plan, pipe: Any, index: int, stage: Callable[[str], Any]) -> dict[str, Generated]:
    prompt, seed = plan.prompts[index], plan.settings.seed + plan.sample(index)
    results: dict[str, Generated] = {}
    for name in _videos(plan):
        with stage(name):
            if name == DENSE or plan.preset is None:
                results[name] = generate_video(pipe, plan, prompt, name, seed)
            else:
                results[name] = generate_sparse(pipe, plan, plan.preset, prompt, seed)
    return results


def _write_prompt(plan: Plan, index: int, results: dict[str, Generated], path: Path, about: dict[str, Any]) -> None:
    prompt, name, seed = plan.prompts[index], plan.name, plan.settings.seed + plan.sample(index)
    report: dict[str, Any] = {"prompt": prompt, "index": index, "seed": seed, "preset": plan.settings.preset}
    report["sample"] = plan.sample(index)
    report["runs"] = {key: _as_json(result) for key, result in results.items()}
    report["videos"] = {key: f"{key}.mp4" for key in results}
    report["files"] = {}
    for key, result in results.items():
        write_video(path / f"{key}.mp4", result.frames, plan.settings.fps, result.sound)
        for warning in result.warnings:
            print(f"warning: {key}, {prompt[:60]!r}: {warning}", file=sys.stderr)
    if plan.settings.compare:
        dense, sparse = results[DENSE], results[name]
        labels, sounds = (_label(DENSE, dense), _label(name, sparse)), (dense.sound, sparse.sound)
        comparison = write_comparison(path, dense.frames, sparse.frames, labels, plan.settings.fps, sounds)
        report["files"] = comparison.pop("files")
        if sparse.masks:
            write_image(path / OVERLAY, attention_overlay(sparse.frames, sparse.masks))
            report["files"]["attention"] = OVERLAY
        report["comparison"] = {
            **comparison,
            "speedup": _speedup(dense, sparse),
            "denoising": _denoising(dense, sparse),
        }
    write_json(path / PROMPT_FILE, {**report, "bytes": sizes(path), **about})


def _as_json(result: Generated) -> dict[str, Any]:
    told = {
        "seconds": result.seconds,
        "warnings": result.warnings,
        "attention": result.attention,
        "peak_memory_gib": result.peak_memory_gib,
    }
    return told if result.sound is None else {**told, "sound": result.sound.about()}


def _label(name: str, result: Generated) -> Label:
    facts = [f"{result.seconds['total']:.1f} s"]
    if result.attention is not None:
        facts.append(f"density {result.attention['density_run']:.2f}")
    return Label(name, tuple(facts))


def _speedup(dense: Generated, sparse: Generated) -> dict[str, float | None]:
    """How many times as fast the sparse run was, without what first steps took to compile."""
    step = sparse.seconds["median_sparse_step"]

    def settled(run: Generated, what: str) -> float:
        return run.seconds[what] - first_calls(run.seconds["per_step"], _dense_at(run))

    return {
        "total": settled(dense, "total") / settled(sparse, "total"),
        "denoise": settled(dense, "denoise") / settled(sparse, "denoise"),
        "sparse_step": dense.seconds["median_step"] / step if step else None,
    }


def _dense_at(run: Generated) -> list[int] | None:
    """Which of its steps were dense; None if no step of it could be sparse."""
    return None if run.attention is None else run.attention["dense_at"]


def _denoising(dense: Generated, sparse: Generated) -> dict[str, float] | None:
    return settled_seconds(dense.seconds["per_step"], sparse.seconds["per_step"], _dense_at(sparse) or [])


def finish(plan: Plan, folder: RunFolder, todo: list[int], phases: Phases | None = None) -> dict[str, Any]:
    """Write the report of what is finished and sum it up.

    Args:
        todo: the prompts that were missing before.
        phases: where this process's seconds went; None where other processes made the videos.
    """
    reports = folder.finished()
    missing = len(plan.prompts) - len(reports)
    made = len(set(todo) - set(folder.missing()))
    gain = denoising(plan, reports)
    if reports:
        spent = as_rows(phases.seconds()) if phases is not None and made else []
        with phases.phase("report") if phases is not None else contextlib.nullcontext():
            remarks = [gain["not_faster"]] if gain is not None and gain["not_faster"] else []
            write_report(folder.path, reports, missing=missing, spent=spent, remarks=remarks)
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
        "seconds": None if phases is None else phases.seconds(),
        "denoising": gain,
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
        "flicker": comparison["flicker"]["mean"] if "flicker" in comparison else None,
        "vmaf": comparison["vmaf"]["mean"] if "vmaf" in comparison else None,
        "speedup": comparison["speedup"]["total"] if comparison else None,
        "warnings": [
            *report.get("warnings", []),
            *(f"{name}: {warning}" for name, entry in runs.items() for warning in entry["warnings"]),
        ],
    }
