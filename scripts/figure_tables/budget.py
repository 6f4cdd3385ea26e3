"""What psa-auto pays for its choice of blocks, and for its correction."""

from __future__ import annotations

from figure_tables.source import duration, machine, need, origin, table

PRICE, CORRECTION = "benchmarks/allocation", "benchmarks/correction"
SHAPES = {"wan2.1-14b-720p": "Wan2.1-14B at 720p", "wan2.1-1.3b-480p": "Wan2.1-1.3B at 480p"}
PARTS = {
    "adding": "added, each sparse step",
    "how much holds": "how much holds, some 16 times a run",
    "left out": "found, once a run, beside one sparse call more",
}
MEAN = "correction, mean of a sparse step"


def price() -> str:
    """What choosing by budget costs beyond the pyramids that every call needs."""
    costs = [
        f"{duration(need(PRICE, workload=name, kernel='beyond the pyramids')['ms'])} a call at the size of {title}"
        for name, title in SHAPES.items()
    ]
    joined = ",\nand ".join(costs)
    return f"Beyond the pyramids the rule costs {joined},\non {machine(PRICE)}, {origin(PRICE)}."


def correction_cost() -> str:
    """Parts of the correction by model, and their sum a sparse step."""
    body = []
    for name, title in SHAPES.items():
        made, kept = (_part(name, f"sparse call, lists {way}") for way in ("made", "kept"))
        parts = [_part(name, part) for part in PARTS]
        mean = need(CORRECTION, workload=name, part=MEAN)
        total = f"{duration(mean['ms'])}, {100 * mean['share']:.0f} % of a call"
        body.append([title, f"{made} ({kept})", *parts, total])
    head = ["one layer of", "sparse call (lists kept)", *PARTS.values(), "mean of a sparse step"]
    return f"{table(head, body)}\n\nOn {machine(CORRECTION)}, density 0.15, {origin(CORRECTION)}."


def _part(workload: str, part: str) -> str:
    return duration(need(CORRECTION, workload=workload, part=part)["ms"])
