"""Time what `psa-generate --compare` says of the demo model on a GPU: `python scripts/bench_generate.py`.

    python scripts/bench_generate.py --output docs/benchmarks/generate.json

Runs the command itself, in a process of its own for each row: eager and compiled, with CUDA graphs and without.
Seconds of denoising are those that it reports: means over the prompts, without what the first step of each kind took to
compile. Milliseconds of steps are medians over the prompts after the first. Writes JSON, and prints each row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench_demo import PROMPTS
from random_models import pick_machine
from results import publish

from psa_diffusers.runs.phases import by_kind

WHAT = "psa-generate --compare of the demo model, seconds of denoising and milliseconds of steps"
ROWS = {
    "eager": ("--no-cuda-graphs",),
    "compiled": ("--no-cuda-graphs", "--compile"),
    "CUDA graphs (the default)": (),
    "CUDA graphs, compiled": ("--compile",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help=f"2 to {len(PROMPTS)}")
    parser.add_argument("--preset", default="psa-3")
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if not 2 <= options.prompts <= len(PROMPTS):
        parser.error(f"--prompts {options.prompts}: 2 to {len(PROMPTS)}")
    machine = pick_machine(False, "bench_generate")
    rows = []
    for name, given in ROWS.items():
        figures = measured(options.preset, given, PROMPTS[: options.prompts])
        rows.append({"preset": options.preset, "mode": name, **figures})
        print(json.dumps(rows[-1]), flush=True)
    publish(WHAT, rows, options.output, device=machine.device, commit=options.commit, prompts=options.prompts)


def measured(preset: str, given: tuple[str, ...], prompts: tuple[str, ...]) -> dict[str, Any]:
    """The figures of one run of the command, in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "videos")
        command = [sys.executable, "-m", "psa_diffusers.cli", "--compare", "--preset", preset, *given]
        done = subprocess.run(
            [*command, "--output", str(output), *prompts], stdout=subprocess.PIPE, text=True, check=True
        )
        summary = json.loads(done.stdout.splitlines()[-1])
        reports = [json.loads(path.read_text()) for path in sorted(output.glob("*/report.json"))]
    found = summary["denoising"]
    return {
        "dense_s": found["dense"],
        "sparse_s": found["sparse"],
        "dense_step_ms": median_step([report["runs"]["dense"] for report in reports[1:]]),
        "sparse_step_ms": median_step([report["runs"][preset] for report in reports[1:]]),
        "density": summary["prompts"][0]["density"],
        "psnr": [entry["psnr"] for entry in summary["prompts"]],
    }


def median_step(runs: list[dict[str, Any]]) -> float:
    """Milliseconds of a step: of a sparse run's sparse ones."""
    steps = []
    for run in runs:
        dense, sparse = by_kind(run["seconds"]["per_step"], run["attention"] and run["attention"]["dense_at"])
        steps += sparse or dense
    return round(1000 * median(steps), 2)


if __name__ == "__main__":
    main()
