"""Time many prompts on one GPU and on several: `python scripts/bench_prompts.py --processes 1 4`.

Runs `psa-generate --num-processes` of the bundled demo model, each number of processes in a folder of its own, and
checks that each makes every prompt once and the same files as the first. `seconds` is a whole run, imports, loading and
compiling included. `settled_per_s` is prompts a second once every process has made two, from the times at which
prompts were finished; `share` is that beside the first row's, by process. Writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quality_lab.prompts import prompts_for
from results import publish

from psa_diffusers.files import PROMPT_FILE

ROOT = Path(__file__).resolve().parents[1]
# Prompts that a process makes before the time is taken: the first one compiles.
BEFORE = 2


def main() -> None:
    options = _arguments()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(prompts_for(options.prompts, options.seed)) + "\n")
        wanted: dict[str, str] | None = None
        for processes in options.processes:
            made = Path(folder, str(processes))
            seconds = generate(prompts, made, processes, options)
            videos = digests(made)
            wanted = videos if wanted is None else wanted
            if len(videos) != options.prompts or videos.keys() != wanted.keys():
                raise SystemExit(f"{processes} processes made {len(videos)} of {options.prompts} prompts")
            same = sum(videos[name] == digest for name, digest in wanted.items())
            rate = settled_rate(finished_at(made), processes)
            row = {"processes": processes, "prompts": options.prompts, "preset": options.preset, "seconds": seconds}
            row |= {"settled_per_s": round(rate, 3), "same_files": same}
            first = rows[0] if rows else row
            row["share"] = round(rate / first["settled_per_s"] * first["processes"] / processes, 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    what = "prompts of the demo model, one GPU a process"
    publish(what, rows, options.output, device=options.device, commit=options.commit)


def generate(prompts: Path, output: Path, processes: int, options: argparse.Namespace) -> float:
    """Seconds of a run of psa-generate."""
    command = [sys.executable, "-m", "psa_diffusers.cli", "--preset", options.preset, "--num-processes", str(processes)]
    command += ["--device", options.device, "--output", str(output), *options.generate, str(prompts)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"psa-generate ended with {done.returncode}: {done.stderr[-2000:]}")
    return round(time.perf_counter() - started, 2)


def digests(output: Path) -> dict[str, str]:
    """A digest of each finished prompt's video, by its folder."""
    found = {}
    for report in output.glob(f"*/{PROMPT_FILE}"):
        (name,) = json.loads(report.read_text())["videos"].values()
        found[report.parent.name] = hashlib.sha256((report.parent / name).read_bytes()).hexdigest()
    return found


def finished_at(output: Path) -> list[float]:
    """When each prompt was finished, in seconds, in order."""
    return sorted(report.stat().st_mtime for report in output.glob(f"*/{PROMPT_FILE}"))


def settled_rate(finished: list[float], processes: int) -> float:
    """Prompts a second from the time on at which each process has made `BEFORE`, if all are as fast, to the last one's.

    Args:
        finished: when each prompt was finished, in order.
    """
    before = BEFORE * processes
    return (len(finished) - before) / (finished[-1] - finished[before - 1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--preset", default="psa-3")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seed", type=int, default=4242, help="of the prompts; default: %(default)s")
    parser.add_argument("--generate", nargs=argparse.REMAINDER, default=[], help="more options of psa-generate; last")
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if options.prompts <= BEFORE * max(options.processes):
        parser.error(f"--prompts {options.prompts}: expected more than {BEFORE} for each of the processes")
    return options


if __name__ == "__main__":
    main()
