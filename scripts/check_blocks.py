"""Check PSA on one block of every published transformer at full size.

    python scripts/check_blocks.py --output blocks.json

Needs a CUDA device, but for `--tiny`. Each published configuration (psa_testing) is built at its width,
heads, text length and default video, but with one block of each kind, random bf16 weights and noise. Then: the dense
phase must be bit-identical to stock diffusers; PSA that keeps everything must equal dense to rounding; psa-3 must be
finite and differ; padded text must change nothing. Times are medians of one forward of that block, and of what is
before and after it in the model. Of noise no part matters more than another, so the distance of psa-3 from dense says
nothing about quality. Prints a table; writes JSON after every row. The exit status is 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from block_checks import check
from earlier_rows import read_rows
from figure_tables.block_rows import table
from random_models import Machine, pick_machine, published_models
from results import document, publish, write

ROOT = Path(__file__).resolve().parents[1]
WHAT = "one block of each kind of the published transformers, random weights, dense and psa-3"


def main() -> int:
    options = _arguments()
    machine = pick_machine(options.tiny, "check_blocks")
    names = {checkpoint.split("/")[1]: checkpoint for checkpoint in published_models()}
    rows = read_rows(options.merge, options.output, machine.device)
    for name in options.only or names:
        row = {"name": name, "checkpoint": names[name], **guarded(names[name], machine, options.repeats)}
        rows = [earlier for earlier in rows if earlier["name"] != name] + [row]
        print(json.dumps(row), flush=True)
        if options.output:
            write(document(WHAT, rows, device=machine.device, commit=options.commit), options.output)
    print(table(rows))
    publish(WHAT, rows, options.output, device=machine.device, commit=options.commit)
    return int(any("error" in row or row["failed"] for row in rows))


def guarded(checkpoint: str, machine: Machine, repeats: int) -> dict[str, Any]:
    """The figures of one checkpoint, or the error that it ended in: the others are to run all the same."""
    start = time.perf_counter()
    try:
        row = check(checkpoint, machine, repeats)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    # Past the exception, whose frames hold tensors.
    gc.collect()
    if not machine.tiny:
        torch.cuda.empty_cache()
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _arguments() -> argparse.Namespace:
    names = [checkpoint.split("/")[1] for checkpoint in published_models()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"default: all; {', '.join(names)}")
    parser.add_argument("--repeats", type=int, default=3, help="forwards that a median is of")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, fp32; times nothing")
    parser.add_argument("--merge", type=Path, help="JSON of an earlier run on the same machine, to complete")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/blocks.json, and none with --tiny")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/blocks.json"
    return options


if __name__ == "__main__":
    raise SystemExit(main())
