"""What sharing tiles between small blocks is worth: `python scripts/bench_tiles.py`.

The attention kernels, which multiply tiles of fixed size that any number of blocks share, beside a naive kernel that
multiplies one listed block at a time (`operator_bench/naive.py`): attention alone, from the same lists and the same
pyramid, over pyramids of growing coarseness. Needs a CUDA device. Inputs and the choice of blocks are random. The naive
kernel runs with the best of a few tunings, found for each pyramid on the first workload that has it. Results are
compared before anything is timed. Times are medians; TFLOP/s are density x dense FLOPs / time. Writes JSON and, beside
it, a plot, which `--plot-only` makes again from the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from operator_bench import timing
from operator_bench.tiles_plot import plot, table
from operator_bench.workloads import WORKLOADS, Case, Workload, skip
from results import document, write

from psa_diffusers import load_preset
from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.backends.hopper import Hopper
from psa_kernels.blocks import block_count
from psa_kernels.call import make_call
from psa_kernels.layout import TokenLayout, make_layout
from psa_kernels.lists import BlockLists

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
# Block sizes at which each workload is measured.
CHOSEN = {"wan2.1-1.3b-480p": (32, 64, 128), "wan2.1-14b-720p": (64,)}
# Root mean square of the difference between two kernels, relative to the result. bfloat16 rounds weights and results by
# 0.2 % each; a single block that is left out of some 500 would change 4 %.
TOLERANCE = 0.01
TRIALS = 3

Tunings = dict[tuple[int, str], Any]


@dataclass(frozen=True)
class Problem:
    """One call: inputs, pyramid and lists that all kernels are given."""

    q: torch.Tensor
    pyramid: Any
    lists: BlockLists
    layout: TokenLayout
    spec: AttentionSpec

    def call(self, sparse_attention: Callable[..., torch.Tensor], **options: Any) -> Callable[[], torch.Tensor]:
        scale = self.q.shape[-1] ** -0.5
        return partial(sparse_attention, self.q, self.pyramid, self.lists, self.layout, self.spec, scale, **options)

    @property
    def density(self) -> float:
        return AttentionStats.from_lists(self.lists, self.spec, "").density.mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    if options.plot_only:
        show(json.loads(options.plot_only.read_text()), options.plot_only)
        return
    if not torch.cuda.is_available():
        raise SystemExit("bench_tiles: no CUDA device")
    work = [(workload, size) for workload in WORKLOADS for size in CHOSEN.get(workload.name, ())]
    work = [
        (workload, size)
        for workload, size in work
        if options.workload in (None, workload.name) and options.block_key in (None, size)
    ]
    if not work:
        raise SystemExit(f"bench_tiles: {options.workload} is not measured with --block-key {options.block_key}")
    if options.compile_only:
        for workload, size in work:
            compile_all(workload, size)
        return
    rows: list[Row] = []
    tunings: Tunings = {}
    for workload, size in work:
        for row in measure(workload, size, options.repeats, tunings):
            rows.append(row)
            print(_line(row), flush=True)
    what = "attention from the same lists: tiles that blocks share against one block at a time, random data, medians"
    result = document(what, rows, device="cuda", commit=options.commit, repeats=options.repeats)
    write(result, options.output)
    show(result, options.output)


def pyramids(block_key: int) -> dict[str, AttentionSpec]:
    """From blocks that are all kept whole to blocks that are all pooled eight-fold; but the last have density 0.25."""
    made = {}
    for name in ("psa-1", "psa-3", "psa-4", "psa-5", "psa-2"):
        [spec] = load_preset(name).layer_specs(1)
        made[name] = _without_empty_levels(replace(spec, block_key=block_key))
    made["all 8-fold"] = AttentionSpec(block_key=block_key, levels=(8,), thresholds=(1.0,))
    return made


def _without_empty_levels(spec: AttentionSpec) -> AttentionSpec:
    """No kernel is to pay for levels that nothing has."""
    before = (0.0, *spec.thresholds)
    held = [index for index, end in enumerate(spec.thresholds) if end > before[index]]
    levels, thresholds = ([values[index] for index in held] for values in (spec.levels, spec.thresholds))
    return replace(spec, levels=tuple(levels), thresholds=tuple(thresholds))


def measure(workload: Workload, block_key: int, repeats: int, tunings: Tunings, device: str = "cuda") -> Iterator[Row]:
    """Rows of all kernels over all pyramids.

    Args:
        tunings: the naive kernel's by block size and pyramid; what is missing is found and added.

    Raises:
        SystemExit: two kernels disagree.
    """
    from operator_bench import naive

    q, k, v = _inputs(workload, device)
    for name, spec in pyramids(block_key).items():
        problem = _problem(q, k, v, spec)
        tuning = tunings.get((block_key, name)) or _fastest(problem)
        tunings[block_key, name] = tuning
        calls = {"naive": problem.call(naive.sparse_attention, tuning=tuning), **_merged(problem)}
        expected = calls["psa-triton"]()
        for method, call in calls.items():
            _check(call(), expected, f"{method}, {name}, blocks of {block_key} keys")
        del expected
        for method, call in calls.items():
            about = {"pyramid": name, "block_key": block_key, "levels": list(spec.levels)}
            about["tuning"] = tuning._asdict() if method == "naive" else None
            for row in timing.rows_of(Case((method,), problem.density, "attention", call), workload, repeats):
                yield {**about, **row}


def compile_all(workload: Workload, block_key: int) -> None:
    """Fill the compilers' caches on disk."""
    from operator_bench import naive
    from triton import AsyncCompileMode

    q, k, v = _inputs(workload, "cuda")
    problems = [_problem(q, k, v, spec) for spec in pyramids(block_key).values()]
    with ThreadPoolExecutor() as pool, AsyncCompileMode(pool):
        for problem in problems:
            for tuning in naive.TUNINGS:
                problem.call(naive.sparse_attention, tuning=tuning, compile_only=True)()
    for problem in problems:
        for call in _merged(problem).values():
            call()
    torch.cuda.synchronize()


def show(result: Row, output: Path) -> None:
    """Print the table, and draw the plot beside the JSON."""
    print(table(result["rows"]))
    if plot(result["rows"], output.with_suffix(".png")):
        print(f"drew {output.with_suffix('.png')}")


def _inputs(workload: Workload, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half precision on a CPU, where Triton's interpreter takes no bfloat16."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    shape = (1, workload.video, workload.heads, workload.head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    return q, k, v


def _problem(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> Problem:
    from psa_kernels.allocation.triton import allocate
    from psa_kernels.pyramid.triton import build_pyramid

    layout = make_layout(q.shape[1], k.shape[1], 0, 0, None)
    blocks = (block_count(q.shape[1], spec.block_query), block_count(k.shape[1], spec.block_key))
    lists = allocate(torch.rand(1, q.shape[2], *blocks, device=q.device), None, spec)
    return Problem(q, build_pyramid(k, v, layout, spec), lists, layout, spec)


def _merged(problem: Problem) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls of the kernels whose tiles blocks share, as far as they take the problem."""
    from psa_kernels.sparse import triton as portable

    calls = {"psa-triton": problem.call(portable.sparse_attention)}
    q, pyramid, spec = problem.q, problem.pyramid, problem.spec
    obstacle = Hopper().why_not(make_call(q, pyramid.source_keys, pyramid.needed_values()[0], spec))
    if obstacle is None:
        from psa_kernels.sparse.hopper import launch as hopper

        calls["psa-hopper"] = problem.call(hopper.sparse_attention)
    else:
        skip("psa-hopper", obstacle)
    return calls


def _check(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference = (found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
    if not difference.item() <= TOLERANCE:
        raise SystemExit(f"bench_tiles: {what}: differs from psa-triton by {difference.item():.2%}; nothing is timed")


def _fastest(problem: Problem) -> Any:
    """The naive kernel's fastest tuning; one that needs more shared memory than there is does not count."""
    from operator_bench import naive
    from triton.runtime.errors import OutOfResources

    times = {}
    for tuning in naive.TUNINGS:
        with suppress(OutOfResources):
            times[tuning], _ = timing.measure(problem.call(naive.sparse_attention, tuning=tuning), TRIALS)
    return min(times, key=times.get)


def _line(row: Row) -> str:
    label = f"{row['workload']:18} blocks of {row['block_key']:3} {row['pyramid']:11} {row['method']:10}"
    if "error" in row:
        return f"{label} {row['error']}"
    return f"{label} density {row['density']:.4f} {row['ms']:9.3f} ms {row['tflops']:7.1f} TFLOP/s"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=list(CHOSEN), help="default: all")
    parser.add_argument("--block-key", type=int, choices=(32, 64, 128), help="default: all that the workload has")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; fewer of those that take over 100 ms")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/quality/kernels.json")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--compile-only", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--plot-only", type=Path, metavar="JSON", help="measure nothing, show this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
