"""What the correction of `psa-auto` costs a call, part by part, beside the call: `python scripts/bench_correction.py`.

    python scripts/bench_correction.py --density 0.15 --output docs/benchmarks/correction.json

Needs a CUDA device. One layer of Wan2.1-14B at 720p and one of 1.3B at 480p, bf16; medians of calls that are enqueued
back to back. Parts: the sparse call with lists made and kept; finding what is left out, once a run, at the last dense
step, which takes a sparse call more; asking how much of it still holds, some 16 times a run; adding it, at each sparse
step. `correction, mean of a sparse step` is what a run of 50 steps pays for all of them, by its sparse steps; `share`
is that beside the mean sparse call of such a run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_allocation import CHOSEN, rows_of_chosen, tensors
from operator_bench.timing import measure
from operator_bench.workloads import Workload
from results import document, write

from psa_diffusers import Preset, load_preset
from psa_diffusers.patch.corrections import how_much_holds, steps_a_telling
from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import psa_attention
from psa_kernels.correction.choose import add_correction, left_out

WHAT = "time of the parts of the correction on one call, milliseconds, medians"
OUTPUT = Path("docs/benchmarks/correction.json")
STEPS = 50


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_correction: no CUDA device")
    rows = rows_of_chosen(CHOSEN, partial(rows_of, options=options))
    write(document(WHAT, rows, device="cuda", commit=options.commit, density=options.density), options.output)


def rows_of(workload: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of {workload, part, ms, share}; share, of the mean sparse call, is that of the last row alone."""
    preset = load_preset("psa-auto").at_density(options.density)
    found: dict[str, float] = {}
    for part, call in parts(workload, preset):
        found[part] = ms = measure(call, options.repeats)[0]
        yield {"workload": workload.name, "part": part, "ms": round(ms, 4), "share": None}
    sparse_steps = STEPS - math.ceil(preset.dense_steps * STEPS)
    tellings = math.ceil(sparse_steps / steps_a_telling(STEPS))
    once = found["sparse call, lists made"] + found["left out"]
    ms = (once + tellings * found["how much holds"]) / sparse_steps + found["adding"]
    made = 1 / preset.refresh
    call_ms = made * found["sparse call, lists made"] + (1 - made) * found["sparse call, lists kept"]
    part = "correction, mean of a sparse step"
    yield {"workload": workload.name, "part": part, "ms": round(ms, 4), "share": round(ms / call_ms, 4)}


def parts(workload: Workload, preset: Preset) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each part and its call, as `patch.corrections` makes it."""
    q, k, v = tensors(workload)
    [spec] = set(preset.layer_specs(1))
    permutation = token_permutation("hilbert", workload.grid).cuda()
    attend = partial(psa_attention, q, k, v, spec, permutation=permutation)
    sparse, _, lists = attend(return_stats=True, return_lists=True)
    dense = dense_attention(q, k, v)
    correction = left_out(dense, sparse)
    weights = torch.full(sparse.shape[::2], 0.5, device="cuda")
    yield "sparse call, lists made", partial(attend, return_stats=True)
    yield "sparse call, lists kept", partial(attend, return_stats=True, lists=lists)
    yield "left out", partial(left_out, dense, sparse)
    yield (
        "how much holds",
        partial(how_much_holds, correction, sparse, lambda tokens: dense_attention(q[:, tokens], k, v)),
    )
    yield "adding", partial(add_correction, sparse.clone(), correction, weights)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of tensors `[B, N, H, D]`."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
