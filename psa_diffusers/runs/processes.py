"""Runs several processes that share the prompts of one run, each on its own GPU."""

from __future__ import annotations

import multiprocessing
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from psa_diffusers.errors import InputError
from psa_diffusers.runs import stopping
from psa_diffusers.runs.folder import RunFolder
from psa_diffusers.runs.folder_lock import locked
from psa_diffusers.runs.generate import Interrupted, finish, run
from psa_diffusers.runs.plan import Plan
from psa_diffusers.runs.rank import Place

REFUSED = 2  # exit code of a process whose input is wrong
SECONDS_TO_STOP = 10


def check_devices(plan: Plan, processes: int, overwrite_alone: bool = False) -> None:
    """Refuse options that do not work with several processes.

    Args:
        overwrite_alone: whether no parent process can remove an older run before the processes start.

    Raises:
        InputError: names the option.
    """
    device = plan.settings.device
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device {device}: {processes} processes need a device each; use --device cuda, or cpu")
    if device == "cuda":
        import torch

        if processes > torch.cuda.device_count():
            raise InputError(f"--num-processes {processes}: this machine has {torch.cuda.device_count()} CUDA devices")
    if overwrite_alone and plan.overwrite:
        raise InputError("--overwrite: not under accelerate launch; remove the folder, or use --num-processes")


def work(plan: Plan, place: Place) -> None:
    """The work of one process: its part of the prompts. If the input is wrong, the parent tells the user."""
    try:
        with stopping.listening(once=True):
            run(plan, place)
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        _folder(plan, place.launch).refusal(str(error))
        sys.exit(REFUSED)


def _folder(plan: Plan, launch: str | None) -> RunFolder:
    return RunFolder(plan.output, plan.settings.to_dict(), plan.prompts, launch)


def run_shared(plan: Plan, processes: int, target: Callable[[Plan, Place], None] = work) -> dict[str, Any]:
    """As `generate.run`, with several processes on this machine. The summary lacks a prompt whose process died.

    Args:
        target: the function that each process calls; must be importable.

    Raises:
        InputError: as `generate.run`, or there are too few devices.
        Interrupted: as `generate.run`.
    """
    check_devices(plan, processes)
    folder = _folder(plan, uuid.uuid4().hex)
    folder.check(plan.overwrite)
    try:
        with locked(folder.path):
            folder.check(plan.overwrite)  # another process may have worked there until now
            return _run_shared(plan, folder, processes, target)
    finally:
        folder.withdraw()


def _run_shared(plan: Plan, folder: RunFolder, processes: int, target: Callable[[Plan, Place], None]) -> dict[str, Any]:
    todo = folder.missing()
    if todo:
        folder.begin()
        plan = replace(plan, overwrite=False)
    context = multiprocessing.get_context("spawn")
    ranks = min(processes, len(todo))
    places = [Place(rank, ranks, rank, folder.launch, reports=False) for rank in range(ranks)]
    workers = [context.Process(target=target, args=(plan, place), daemon=True) for place in places]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        # Ctrl-C in a terminal reaches the children too; what stops this process alone does not.
        _stop([worker for worker in workers if worker.pid is not None])
        raise Interrupted(finish(plan, folder, todo)) from None
    refusal = folder.refusal()
    if refusal is not None:
        finish(plan, folder, todo)
        raise InputError(refusal)
    for place, worker in zip(places, workers, strict=True):
        if worker.exitcode:
            print(f"warning: process {place.rank} ended with exit code {worker.exitcode}", file=sys.stderr)
    return finish(plan, folder, todo)


def _stop(workers: list[Any]) -> None:
    """Ask processes to stop; kill those that do not. The next run cleans up after these."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=SECONDS_TO_STOP)
        worker.kill()
        worker.join()
