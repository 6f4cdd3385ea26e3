"""Time attention in float32, sparse by the portable kernels and dense, with torch's TF32 off and on.

    python scripts/bench_float32.py --output docs/benchmarks/float32.json

Needs a CUDA device, but for `--tiny`. What it finds decides the default of the preset key `float32_on_gpu`: sparse
pays where `ratio`, dense time by sparse time at the same setting of TF32, is above 1. `error` is how far the first
queries of a call are from float64 over all keys, relative L2; at a density below 1 that is what being sparse costs on
random inputs, so only the rows of density 1 compare the arithmetic. Prints rows; writes JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from comparing import relative_error
from operator_bench.timing import measure
from operator_bench.workloads import WORKLOADS, Workload
from results import publish

from psa_kernels import AttentionSpec, psa_attention
from psa_presets import load_preset

ROOT = Path(__file__).resolve().parents[1]
DENSITIES = (1.0, 0.25, 0.15)
# The demo model's call, the same with narrower heads, and a toy of it for machines without a GPU.
DEMO, NARROW = Workload("demo", 4, 64, (9, 24, 24)), Workload("narrow", 4, 32, (9, 24, 24))
TOY = Workload("toy", 2, 16, (3, 8, 8))
MAX_TOKENS = 40_000  # longer calls take minutes, and show the same
COMPARED = 64  # queries


def main() -> None:
    options = _arguments()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_float32: no CUDA device; --tiny runs a toy on the CPU")
    device = "cpu" if options.tiny else "cuda"
    short = [each for each in WORKLOADS if each.tokens <= MAX_TOKENS]
    rows = []
    for workload in (TOY,) if options.tiny else (DEMO, NARROW, *short):
        for row in rows_of(workload, device, options.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
    what = "attention in float32, random inputs, medians"
    publish(what, rows, options.output, device=device, commit=options.commit)


def rows_of(workload: Workload, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one workload: at each setting of TF32 the dense one, then ours."""
    torch.manual_seed(0)
    shape = (1, workload.tokens, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, device=device) for _ in range(3))
    exact = _dense(*(x[:, :, :1].double() for x in (q[:, :COMPARED], k, v)))
    for tf32 in (False, True):
        with tf32_set(tf32):
            dense_ms: float | None = None
            for method, density, call in calls(workload, q, k, v):
                row = {"workload": workload.name, "tokens": workload.tokens, "heads": workload.heads}
                row |= {"head_dim": workload.head_dim, "method": method, "density": density, "tf32": tf32}
                error = relative_error(call()[:, :COMPARED, :1], exact)
                ms, extra = timed(call, repeats, device)
                dense_ms = ms if dense_ms is None else dense_ms
                yield row | {"ms": ms, "extra_gib": extra, "ratio": round(dense_ms / ms, 3), "error": error}


def calls(
    workload: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[str, float, Callable[[], torch.Tensor]]]:
    """What is timed: name, density asked for, call; the dense one first."""
    yield "sdpa", 1.0, lambda: _dense(q, k, v)
    implementation = "triton" if q.is_cuda else "reference"
    for density in DENSITIES:
        preset = load_preset("psa-3").at_density(density)
        spec = AttentionSpec(levels=preset.levels, thresholds=preset.thresholds)
        yield (
            f"psa-{implementation}",
            density,
            lambda spec=spec: psa_attention(q, k, v, spec, text_after=workload.text, implementation=implementation),
        )


def timed(call: Callable[[], torch.Tensor], repeats: int, device: str) -> tuple[float, float | None]:
    """Median milliseconds, and GiB beyond the inputs where that can be told."""
    if device == "cpu":
        start = perf_counter()
        call()
        return round(1e3 * (perf_counter() - start), 4), None
    ms, extra = measure(call, repeats)
    return round(ms, 4), round(extra, 3)


@contextmanager
def tf32_set(on: bool) -> Iterator[None]:
    """torch's setting for products of float32, and back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument(
        "--tiny", action="store_true", help="a toy on the CPU: shows that it runs, measures nothing of use"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
