"""From how many tokens on a sparse call is faster than a dense one: what the preset key `min_tokens` should be.

    python scripts/bench_min_tokens.py --output docs/benchmarks/min-tokens.json

Needs a CUDA device, but for `--tiny`. A call is what the pipeline's path makes of a layer: psa-3 in Hilbert order,
statistics asked for. Dense is PyTorch's `scaled_dot_product_attention` with its default choice of kernel. Times are
until the device is done with calls one after the other, the host's part included. `dense_gflop` is the work of the
dense call, by which `min_tokens: auto` decides on a GPU. Per kind of call (`head_dim`, `dtype`, `tf32`,
`implementation`, `density`, `kept_lists`) `crossings` has the fewest tokens from which on all calls that were timed are
no slower than dense; null where the longest one is slower. Prints rows; writes JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from bench_float32 import tf32_set
from results import publish

from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import psa_attention
from psa_presets import load_preset

Grid = tuple[int, int, int]
Run = tuple[int, int, torch.dtype, bool, tuple[Grid, ...]]
# Few, because what takes long is to compile the kernels of each length, dtype and head_dim.
GRIDS = ((8, 16, 16), (4, 32, 32), (9, 24, 24), (8, 32, 32))
# Heads, head_dim, dtype, TF32, token grids.
RUNS: tuple[Run, ...] = (
    (24, 64, torch.bfloat16, False, GRIDS),
    (12, 128, torch.bfloat16, False, GRIDS[1:3]),
    (24, 64, torch.float32, False, GRIDS[2:3]),
    (24, 64, torch.float32, True, GRIDS[2:3]),
)
TOYS: tuple[Run, ...] = tuple((1, 16, dtype, tf32, ((2, 8, 8),)) for _, _, dtype, tf32, _ in RUNS[:1] + RUNS[2:])
DENSITIES = (0.15, 0.25)
KIND = ("head_dim", "dtype", "tf32", "implementation", "density", "kept_lists")
CALLS = 8


def main() -> None:
    options = _arguments()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_min_tokens: no CUDA device; --tiny runs a toy on the CPU")
    device = "cpu" if options.tiny else "cuda"
    rows: list[dict[str, Any]] = []
    for heads, head_dim, dtype, tf32, grids in TOYS if options.tiny else RUNS:
        for grid in grids:
            with tf32_set(tf32):
                for row in rows_of(grid, heads, head_dim, dtype, device, options.repeats):
                    rows.append({**row, "tf32": tf32})
                    print(json.dumps(rows[-1]), flush=True)
    found = crossings(rows)
    for each in found:
        print(json.dumps(each))
    publish(
        "sparse and dense calls by length, random inputs, medians", rows, options.output, device=device,
        commit=options.commit, crossings=found,
    )  # fmt: skip


@torch.no_grad()
def rows_of(
    grid: Grid, heads: int, head_dim: int, dtype: torch.dtype, device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of one shape: microseconds of a sparse call, and of the dense one."""
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(1, tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    permutation = token_permutation("hilbert", grid).to(device)
    dense = timed(lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))), repeats)
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
    shape["dense_gflop"] = round(4 * heads * tokens**2 * head_dim / 1e9, 2)
    implementations = ("reference",) if device == "cpu" else ("triton", "hopper")
    if dtype == torch.float32:  # the kernel for Hopper does not serve it
        implementations = implementations[:1]
    for implementation, density in product(implementations, DENSITIES):
        [spec] = set(load_preset("psa-3").at_density(density).layer_specs(1))
        settings: dict[str, Any] = {"permutation": permutation, "implementation": implementation, "return_stats": True}
        kind = {**shape, "implementation": implementation, "density": density, "dense_us": dense}
        lists = psa_attention(q, k, v, spec, return_lists=True, **settings)[2]
        for kept in (None, lists):
            us = timed(lambda: psa_attention(q, k, v, spec, lists=kept, **settings), repeats)  # noqa: B023
            yield {**kind, "kept_lists": kept is not None, "us": us, "ratio": round(dense / us, 3)}


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds of a call."""
    times = []
    for turn in range(2 + repeats):
        wait()
        start = perf_counter()
        for _ in range(CALLS):
            call()
        wait()
        if turn >= 2:
            times.append(perf_counter() - start)
    return round(median(times) / CALLS * 1e6, 1)


def crossings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kind of call, from how many tokens on sparse is no slower than dense."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[key] for key in KIND), []).append(row)
    found = []
    for kind, alike in kinds.items():
        slower = [row["tokens"] for row in alike if row["ratio"] < 1]
        enough = [row["tokens"] for row in alike if row["tokens"] > max(slower, default=0)]
        found.append({**dict(zip(KIND, kind, strict=True)), "crossing": min(enough, default=None)})
    return found


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU: shows that it runs, measures nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
