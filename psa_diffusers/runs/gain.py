"""What denoising took in compared runs, dense and sparse, and the line that says so where sparse was not faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from psa_diffusers.runs.phases import by_kind, settled

if TYPE_CHECKING:
    from psa_diffusers.runs.plan import Plan

# With fewer steps of a kind there is no telling what the first one took to compile kernels.
FEWEST = 3


def settled_seconds(
    dense: Sequence[float], sparse: Sequence[float], dense_at: Sequence[int]
) -> dict[str, float] | None:
    """Seconds of all steps of a dense and of a sparse run, without what the first of each kind took to compile kernels.

    Dense steps of the sparse run, if they are few, count as the median of those of the dense run.

    Args:
        dense, sparse: seconds of each step of the runs.
        dense_at: which steps of the sparse run were dense, counted from 0.

    Returns:
        `dense` and `sparse`; None if there are too few steps to tell, or none was sparse.
    """
    beside, alone = by_kind(sparse, dense_at)
    if min(len(dense), len(alone)) < FEWEST:
        return None
    of_dense = settled(beside) if len(beside) >= FEWEST else len(beside) * median(dense)
    seconds = {"dense": settled(dense), "sparse": of_dense + settled(alone)}
    return {name: round(took, 4) for name, took in seconds.items()}


def denoising(plan: Plan, reports: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """`settled_seconds` of a run's prompts, means, and under `not_faster` the line about it; None if nothing is known.

    Args:
        reports: what the prompts' report.json hold.
    """
    compared = [report["comparison"] for report in reports if "comparison" in report]
    found = [seconds for each in compared if (seconds := each.get("denoising")) is not None]
    if not found:
        return None
    dense, sparse = (round(fmean(seconds[name] for seconds in found), 4) for name in ("dense", "sparse"))
    return {"dense": dense, "sparse": sparse, "not_faster": None if sparse < dense else _line(plan, dense, sparse)}


def _line(plan: Plan, dense: float, sparse: float) -> str:
    settings, model = plan.settings, plan.model
    size = settings.frames, settings.height, settings.width
    tokens = math.prod(model.token_grid(*size, with_image=plan.image is not None))
    heads = "" if model.num_heads is None else f" x {model.num_heads} heads"
    return (
        f"denoising with {plan.name} took {sparse / dense:.2f} times as long as dense, {sparse:.3g} s against "
        f"{dense:.3g} s, compiling left out: attention of {tokens:,} tokens{heads} gains nothing on this device"
    )
