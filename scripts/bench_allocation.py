"""What the rule `budget` costs on a CUDA device, kernel by kernel: statistics, prices, and the lists.

    python scripts/bench_allocation.py --output docs/benchmarks/allocation.json
    python scripts/bench_allocation.py --levels 1 2 4 8 --density 0.15

Times each kernel of the stage by itself, and the stage, at the sizes of Wan2.1-14B at 720p and of 1.3B at 480p, bf16:
medians of calls that are enqueued back to back. Besides `ms` it gives `GB/s` of what a kernel reads of q, k and v: it
can be no faster than the memory. Calls of the operator make the pyramids of keys and values and find their
spread in one pass each. What the rule costs them is in the row `beyond the pyramids`: `pyramids, prices and allocation`
less both pyramids alone, which every call needs; importance is in neither. For a comparison with another commit run the
script that it has on the same machine, in one go.

Tensors vary smoothly along the tokens, so that rows of prices are spread as those of models are: the search for the
price takes as many rounds as its rows need. Under half a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from operator_bench.timing import measure
from operator_bench.workloads import WORKLOADS, Workload
from results import document, write

from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.call import make_call

WHAT = "time of each kernel of the rule budget on one call, milliseconds, medians"
CHOSEN = ("wan2.1-14b-720p", "wan2.1-1.3b-480p")
OUTPUT = Path("docs/benchmarks/allocation.json")
# Tokens between which the tensors go from one random vector to another.
SMOOTH = 24


def main() -> None:
    options = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_allocation: no CUDA device")
    if max(options.levels) > 8:
        raise SystemExit(
            f"bench_allocation: --levels {options.levels}: expected at most 8, which are pooled in one pass"
        )
    rows = rows_of_chosen(options.workloads, partial(rows_of, options=options))
    settings = {"levels": options.levels, "block_key": options.block_key, "order": options.order}
    write(document(WHAT, rows, device="cuda", commit=options.commit, **settings), options.output)


def rows_of_chosen(
    names: Sequence[str], rows_of: Callable[[Workload], Iterator[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of all workloads with these names, printed as they come."""
    rows = []
    for workload in WORKLOADS:
        if workload.name in names:
            for row in rows_of(workload):
                rows.append(row)
                print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()
    return rows


def rows_of(workload: Workload, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    q, k, v = tensors(workload)
    permutation = None if options.order == "raster" else token_permutation(options.order, workload.grid).cuda()
    spec = AttentionSpec(
        rule="budget", density=options.density, levels=tuple(options.levels), block_key=options.block_key
    )
    size = q.numel() * q.element_size()
    density = None
    found: dict[str, float] = {}
    for kernel, call, reads in kernels(q, k, v, permutation, spec):
        found[kernel] = ms = measure(call, options.repeats)[0]
        if kernel == "allocation":
            density = round(AttentionStats.from_lists(call(), spec, "").density.mean().item(), 4)
        rate = round(reads * size / ms / 1e6) if reads else None
        yield {"workload": workload.name, "kernel": kernel, "ms": round(ms, 4), "GB/s": rate, "density": density}
    ms = found["pyramids, prices and allocation"] - found["pyramid of keys"] - found["pyramid of values"]
    yield {
        "workload": workload.name,
        "kernel": "beyond the pyramids",
        "ms": round(ms, 4),
        "GB/s": None,
        "density": density,
    }


def kernels(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, permutation: torch.Tensor | None, spec: AttentionSpec
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Name, call, and how much it reads of q, k and v, each 1; each is given what those before it return."""
    from psa_kernels.allocation import triton_prices as prices
    from psa_kernels.allocation import triton_statistics as statistics
    from psa_kernels.allocation.prices import energy_stride
    from psa_kernels.allocation.triton_budget import allocate_budget
    from psa_kernels.importance.triton import block_importance
    from psa_kernels.pyramid import triton as pyramid

    call = make_call(q, k, v, spec, permutation=permutation)
    layout, scale = call.layout, call.scale
    importance = block_importance(q, k, layout, spec, scale)
    both = pyramid.empty_pyramid(k, v, layout, spec, gathered=True)
    keys = partial(statistics.key_spread, k, layout, spec, both.keys, both.factors)
    values = partial(statistics.value_spread, v, layout, spec, both.values, both.factors)
    spreads = keys(), values()
    price = partial(prices.upgrade_prices, q, k, v, importance, layout, spec, scale)
    priced = price(*spreads)
    read = 1 / energy_stride(spec)
    yield "pyramid of keys", partial(pyramid.pool_keys, k, layout, spec, gathered=True), 1
    yield "pyramid of values", partial(pyramid.pool_tokens, v, layout, both.factors), 1
    yield "importance", partial(block_importance, q, k, layout, spec, scale), 0
    yield "query energy", partial(statistics.query_energy, q, layout, spec, scale), read
    yield "key spread alone", partial(statistics.key_spread, k, layout, spec), 1
    yield "value spread alone", partial(statistics.value_spread, v, layout, spec), 1
    yield "pyramid of keys, with their spread", keys, 1
    yield "pyramid of values, with their spread", values, 1
    yield "mean outputs", partial(prices.mean_outputs, q, importance, spreads[1][0]), 0
    yield "prices, with query energy and mean outputs", partial(price, *spreads), read
    yield "allocation", partial(allocate_budget, priced, importance, spec), 0
    yield (
        "pyramids, prices and allocation",
        lambda: allocate_budget(price(keys(), values()), importance, spec),
        2 + read,
    )


def tensors(workload: Workload) -> list[torch.Tensor]:
    """q, k and v of a call, bf16, whose neighbours are alike."""
    torch.manual_seed(0)
    shape = (workload.tokens // SMOOTH + 2, workload.heads * workload.head_dim)
    found = []
    for _ in range(3):
        knots = torch.randn(1, shape[1], shape[0], device="cuda", dtype=torch.bfloat16)
        smooth = torch.nn.functional.interpolate(knots, size=workload.tokens, mode="linear")
        noise = torch.randn(workload.tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        mixed = smooth[0].T + 0.3 * noise
        found.append(mixed.reshape(1, workload.tokens, workload.heads, workload.head_dim).contiguous())
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[each.name for each in WORKLOADS], default=list(CHOSEN))
    parser.add_argument("--levels", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--block-key", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.15)
    parser.add_argument("--order", choices=("raster", "hilbert"), default="hilbert")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
