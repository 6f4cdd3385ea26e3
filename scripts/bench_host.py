"""What one call of the operator costs the host, stage by stage, beside what it takes and what a CUDA graph of it takes.

    python scripts/bench_host.py --output docs/benchmarks/host.json

Needs a CUDA device. A call is what the pipeline's path makes of a layer: the spec of psa-3 in Hilbert order, statistics
asked for. `host_us` is the time until the call returns while the GPU has less to do than a queue holds; `wall_us` is
that of calls one after the other until the GPU has done all of them; `graph_us` is a replay of the captured call.
Kept lists are those of an earlier call. Medians. Dense attention of PyTorch stands beside. Of the stages,
`attend` pools too where the selection reads nothing of the pyramid, and `pool_keys` finds out no more than that.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import captured
from results import document, write

from psa_diffusers import load_preset
from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import psa_attention
from psa_kernels.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
WHAT = "host and wall time of one call of the operator, microseconds, medians"
SHAPES = (((4, 32, 32), 8, 128), ((8, 32, 32), 24, 64), ((21, 30, 52), 12, 128), ((21, 45, 80), 20, 128))
CALLS = 8  # as many as fit in the queue of launches, several times over


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_host: no CUDA device")
    rows: list[dict[str, Any]] = []
    for grid, heads, head_dim in SHAPES:
        for row in measure(grid, heads, head_dim, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
            settings = {"calls": CALLS, "repeats": options.repeats, "commit": options.commit}
            write(document(WHAT, rows, device="cuda", **settings), options.output)


def measure(
    grid: tuple[int, int, int], heads: int, head_dim: int, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one shape."""
    torch.manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    permutation = token_permutation("hilbert", grid).cuda()
    [spec] = set(load_preset("psa-3").at_density(options.density).layer_specs(1))
    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim}

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    yield {"implementation": "sdpa", **shape, "kept_lists": False, **figures(dense, options.repeats)}
    for implementation in options.implementation:
        settings: dict[str, Any] = {"permutation": permutation, "implementation": implementation, "return_stats": True}
        lists = psa_attention(q, k, v, spec, return_lists=True, **settings)[2]
        for kept in (None, lists):

            def call(kept: Any = kept, settings: dict[str, Any] = settings) -> Any:
                return psa_attention(q, k, v, spec, lists=kept, **settings)

            row = {"implementation": implementation, **shape, "kept_lists": kept is not None}
            row |= figures(call, options.repeats)
            row["stages_us"] = stages(call, implementation, options.repeats)
            yield row
            if options.profile:
                profile(call)


def figures(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Microseconds of a call: of the host, until the GPU is done, and replayed from a graph."""
    for _ in range(3):
        call()
    return {
        "host_us": round(host(call, repeats), 1),
        "wall_us": round(wall(call, repeats), 1),
        "graph_us": round(wall(captured(call), repeats), 1),
    }


def host(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds until a call returns."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / CALLS * 1e6


def wall(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of one call of several, the GPU's part included."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) / CALLS * 1e6


def stages(call: Callable[[], Any], implementation: str, repeats: int) -> dict[str, float]:
    """Microseconds that the host spends in each half of the operator, and in what is around them."""
    [backend] = [each for each in BACKENDS if each.name == implementation]
    spent: dict[str, float] = {}
    names = ("why_not", "pool_keys", "select", "attend")

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        return run

    try:
        for name in names:
            setattr(backend, name, timed(name, getattr(backend, name)))
        start = 0.0
        for _ in range(repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            start += time.perf_counter() - begin
    finally:
        for name in names:
            delattr(backend, name)
    each = {name: round(seconds / repeats / CALLS * 1e6, 1) for name, seconds in spent.items()}
    return {**each, "around": round(start / repeats / CALLS * 1e6 - sum(each.values()), 1)}


def profile(call: Callable[[], Any]) -> None:
    """Print where the host's time goes, function by function."""
    found = cProfile.Profile()
    torch.cuda.synchronize()
    found.enable()
    for _ in range(50):
        call()
        torch.cuda.synchronize()
    found.disable()
    pstats.Stats(found).sort_stats("tottime").print_stats(35)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--implementation", nargs="+", choices=("triton", "hopper"), default=("triton", "hopper"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--profile", action="store_true", help="print where the host's time goes, by function")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/host.json")
    parser.add_argument("--commit", help="default: git's HEAD")
    return parser.parse_args()


if __name__ == "__main__":
    main()
