"""PSA beside Sol-Attn's kernel in 8-bit integers: time at the size of Wan2.1-14B, error on a trained model's attention.

    python scripts/bench_sol.py                # writes docs/benchmarks/sol.json
    python scripts/bench_sol.py --plot-only    # draws docs/benchmarks/sol.png from it and from docs/quality/sol.json

Needs a CUDA device and the package comfy-kitchen, whose `sol_attn` engines use. Milliseconds are medians of whole calls
at 75,600 tokens, 40 heads of 128, bf16, random data. The error is the relative L2 error against dense attention in
float32, a mean over heads and calls, of the same bf16 queries, keys and values of the bundled demo model (its heads of
64 are filled up with zeros to the 128 that Sol-Attn takes). PSA reads the video along a Hilbert curve, Sol-Attn in
raster order, each as it is used. `sol-rule` is Sol-Attn's rule by PSA's portable kernel, without 8-bit integers.
`density` of both is the share of blocks that are exact; they also read one pooled term of each other block.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from attention_judges.demo_model import JUDGE, samples_on
from attention_judges.judges import Grid, dense_attention
from figure_tables.sol import points
from operator_bench import sol_int8
from operator_bench.sol_plot import plot
from operator_bench.timing import measure
from operator_bench.workloads import WORKLOADS
from quality_lab.sol import as_preset
from results import document, write

from psa_diffusers import load_preset
from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import AttentionSpec, psa_attention

ROOT = Path(__file__).resolve().parents[1]
WHAT = "whole calls of PSA and Sol-Attn: time at the size of Wan2.1-14B 720p, error on the demo model's attention"
DENSITIES = (0.10, 0.15, 0.25)
REPEATS = 9
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Method = Callable[[QKV, Grid], Callable[[], torch.Tensor]]  # of inputs on the device: what is timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/sol.json")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing, plot what docs/ holds")
    options = parser.parse_args()
    if options.plot_only:
        if not plot(points(), ROOT / "docs/benchmarks/sol.png"):
            raise SystemExit("bench_sol: matplotlib is not installed")
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_sol: no CUDA device")
    [size] = [workload for workload in WORKLOADS if workload.name == "wan2.1-14b-720p"]
    torch.manual_seed(0)
    shape = (1, size.tokens, size.heads, size.head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    found = [(_half((s.q, s.k, s.v)), s.grid) for s in samples_on("cuda", set(JUDGE.names))]
    rows: list[dict[str, Any]] = []
    for about, method in methods():
        try:
            row = {**about, "ms": round(measure(method((q, k, v), size.grid), REPEATS)[0], 3)}
            row["error"] = round(mean(error(qkv, method(qkv, grid)()) for qkv, grid in found), 5)
        except Exception as problem:  # what does not run here is a fact to report
            row = {**about, "error": None, "problem": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        if isinstance(method, sol_int8.Rule) and "problem" not in row:
            row["density"] = round(mean(method.density(*qkv[:2]) for qkv, _ in found), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(document(WHAT, rows, device="cuda", commit=options.commit, judge=JUDGE.about), options.output)


def methods() -> Iterator[tuple[dict[str, Any], Method]]:
    """What is compared, each with its setting."""
    for density in DENSITIES:
        for name, preset in (
            ("psa-auto", load_preset("psa-auto").at_density(density)),
            ("psa-3", load_preset("psa-3").at_density(density)),
            ("binary", load_preset("psa-1").at_density(density)),
        ):
            [spec] = set(preset.layer_specs(1))
            for kept in (False, True):
                about = {"method": name, "setting": density, "density": density, "kept_lists": kept}
                yield about, _psa(spec, preset.order, kept)
    for density in DENSITIES:
        preset = as_preset(density)
        [spec] = set(preset.layer_specs(1))
        about = {"method": "sol-rule top-k", "setting": density, "density": density, "kept_lists": False}
        yield about, _psa(spec, preset.order, kept=False)
    for rule in sol_int8.RULES:
        yield {"method": f"sol-int8 {rule.kind}", "setting": rule.value, "kept_lists": False}, rule


def _psa(spec: AttentionSpec, order: str, kept: bool) -> Method:
    def make(qkv: QKV, grid: Grid) -> Callable[[], torch.Tensor]:
        permutation = token_permutation(order, grid)
        settings = {"permutation": None if permutation is None else permutation.cuda()}
        lists = psa_attention(*qkv, spec, return_lists=True, **settings)[1] if kept else None
        return lambda: psa_attention(*qkv, spec, lists=lists, **settings)

    return make


def error(qkv: QKV, out: torch.Tensor) -> float:
    """Relative L2 error of attention outputs `[1, N, H, D]` against dense attention in float32, a mean over heads."""
    dense = dense_attention(*(x.float() for x in qkv)).double()
    of_heads = (out.double() - dense).square().sum((0, 1, 3)) / dense.square().sum((0, 1, 3))
    return of_heads.mean().sqrt().item()


def _half(qkv: QKV) -> QKV:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in qkv)
    return q, k, v


if __name__ == "__main__":
    main()
