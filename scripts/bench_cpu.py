"""Time the operator on the CPU against torch's dense attention, fp32, one call after the other in turn.

    python scripts/bench_cpu.py --threads 2 --output docs/benchmarks/cpu.json

Prints a table; the last line is one JSON document, the one that --output receives. Times are medians, with the
quartiles of the ratio, because other programs on the machine disturb both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from results import publish

from psa_kernels import AttentionSpec, psa_attention
from psa_presets import load_preset

SPECS = {
    density: AttentionSpec(thresholds=load_preset("psa-3").at_density(density).thresholds) for density in (0.25, 0.15)
}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(tokens: int, head_dim: int, heads: int, repeats: int) -> list[dict]:
    """One row a density: both are timed in turn, so that a busy moment hits both."""
    q, k, v = (torch.randn(1, tokens, heads, head_dim) for _ in range(3))
    permutation = torch.randperm(tokens)
    dense_inputs = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    rows = []
    for nominal, spec in SPECS.items():

        def dense() -> object:
            return F.scaled_dot_product_attention(*dense_inputs)

        def sparse(spec: AttentionSpec = spec) -> object:
            return psa_attention(q, k, v, spec, permutation=permutation, return_stats=True)

        stats = sparse()[1]
        dense()
        pairs = [(seconds(dense), seconds(sparse)) for _ in range(repeats)]
        low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        rows.append(
            {
                "tokens": tokens,
                "head_dim": head_dim,
                "heads": heads,
                "nominal_density": nominal,
                "density": round(stats.density.mean().item(), 4),
                "dense_ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
                "psa_ms": round(1e3 * statistics.median(b for _, b in pairs), 1),
                "ratio": round(ratio, 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[5184, 8192, 10000])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{'tokens':>7} {'head_dim':>8} {'density':>8} {'dense ms':>9} {'psa ms':>8} {'ratio (quartiles)':>22}")
    rows = []
    for tokens in options.tokens:
        for head_dim in (64, 128):
            for row in measure(tokens, head_dim, options.heads, options.repeats):
                rows.append(row)
                low, high = row["ratio_quartiles"]
                print(
                    f"{tokens:>7} {head_dim:>8} {row['density']:>8.4f} {row['dense_ms']:>9.1f} {row['psa_ms']:>8.1f} "
                    f"{row['ratio']:>9.3f} ({low:.3f}, {high:.3f})",
                    flush=True,
                )
    what = "whole psa_attention call against torch scaled_dot_product_attention, fp32, random data, medians"
    publish(what, rows, options.output, threads=options.threads)


if __name__ == "__main__":
    main()
