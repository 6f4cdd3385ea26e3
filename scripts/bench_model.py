"""Time whole forwards of full-size transformers, dense and sparse.

    python scripts/bench_model.py --output model.json

Needs a CUDA device, but for `--tiny`. Weights are random and latents are noise, which makes no difference to the time:
psa-3 allots shares of blocks, whatever the importance. One forward is one guidance branch. Before the timing, one block
that keeps everything is compared with the dense block. Prints a table; writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from comparing import first, relative_error
from dense_attention import DENSE, all_text_is_real
from earlier_rows import read_rows
from gpu_clock import repeated
from one_step import STEPS, OneStep, scaled_preset
from random_models import WORKLOADS, Machine, Workload, build, make_inputs, pick_machine
from results import document, publish, write

from psa_diffusers import PSAProcessor
from psa_diffusers.families import find_family
from psa_diffusers.runs import compiled as regional

ROOT = Path(__file__).resolve().parents[1]
WHAT = "one forward of a whole transformer, random weights, medians"
METHODS = (*DENSE, "psa")
# psa-3 in raster order, which needs no permutation.
RASTER = "psa-raster"
DENSITIES = (0.25, 0.15, 0.10)


def main() -> None:
    options = _arguments()
    machine = pick_machine(options.tiny, "bench_model")
    earlier = read_rows(options.merge, options.output, machine.device)
    rows = project(earlier)
    measured: list[dict[str, Any]] = []
    models = Models(machine)
    for name in options.workload or WORKLOADS:
        for row in measure(WORKLOADS[name], options, machine, models):
            measured.append(row)
            print(json.dumps(row), flush=True)
            rows = project(merge(earlier, measured))
            if options.output:
                write(document(WHAT, rows, device=machine.device, commit=options.commit), options.output)
    print(table(rows))
    publish(WHAT, rows, options.output, device=machine.device, commit=options.commit)


def is_sparse(method: str) -> bool:
    """Whether a method is ours, and has a density."""
    return method in ("psa", RASTER)


class Models:
    """The transformer of the last workload, which the next one may have too."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._checkpoint = machine, ""
        self._transformer: torch.nn.Module | None = None

    def get(self, checkpoint: str) -> torch.nn.Module:
        """That of a checkpoint; any other is gone."""
        if self._transformer is None or checkpoint != self._checkpoint:
            self._transformer = None
            gc.collect()
            if not self._machine.tiny:
                torch.cuda.empty_cache()
            self._transformer, self._checkpoint = build(checkpoint, self._machine), checkpoint
        return self._transformer


def measure(
    workload: Workload, options: argparse.Namespace, machine: Machine, models: Models
) -> Iterator[dict[str, Any]]:
    """Rows of all methods on one workload."""
    torch.manual_seed(0)
    start = time.perf_counter()
    transformer = models.get(workload.checkpoint)
    # All of the text is real: how much is padding depends on the prompt.
    inputs = make_inputs(workload.checkpoint, transformer, machine, latents=workload.latents, sizes=workload.sizes)
    print(f"# {workload.name}: built in {time.perf_counter() - start:.1f} s", flush=True)
    kept_error: dict[str, float | None] = {}
    if any(map(is_sparse, options.method or METHODS)):
        error, reason = attempt(lambda: block_error(transformer, inputs, machine), machine)
        kept_error = {"kept_error": error}
        found = f"differs from dense by {error:.1e}" if reason is None else f"could not be compared: {reason}"
        print(f"# {workload.name}: a block that keeps everything {found}", flush=True)
    for compiled in options.compiled:
        for method in options.method or METHODS:
            for density in options.density or DENSITIES if is_sparse(method) else (1.0,):
                row = {"workload": workload.name, "method": method, "density": density, "compiled": compiled}
                row |= {
                    "branches": workload.branches,
                    **({"asked": density, **kept_error} if is_sparse(method) else {}),
                }
                figures, reason = attempt(
                    lambda method=method, density=density, compiled=compiled: run(
                        transformer, inputs, method, density, compiled, options.repeats, machine
                    ),
                    machine,
                )
                yield {**row, **(figures if reason is None else {"error": reason})}


def attempt(call: Callable[[], Any], machine: Machine) -> tuple[Any, str | None]:
    """What a call returns, or None and its error in one line: a method that does not run here is a fact to report."""
    try:
        return call(), None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    # Past the exception, whose frames hold tensors.
    gc.collect()
    if not machine.tiny:
        torch.cuda.empty_cache()
    return None, reason


def run(
    transformer: torch.nn.Module,
    inputs: dict[str, Any],
    method: str,
    density: float,
    compiled: bool,
    repeats: int,
    machine: Machine,
) -> dict[str, Any]:
    """Milliseconds and peak memory of one forward, and the density that it really had.

    The transformer is left as it was, whatever happens.

    Raises:
        ValueError: FlashAttention 3 is to run a model whose text is padded, which it would attend.
    """
    if method == "fa3" and not all_text_is_real(inputs):
        raise ValueError("fa3 takes no mask, but some of the text is padding")
    pipe = OneStep(transformer, inputs)
    processor = None
    with nullcontext() if is_sparse(method) else DENSE[method](), torch.no_grad():
        try:
            if is_sparse(method):
                preset = scaled_preset(machine, density)
                preset = preset.replace(order="raster") if method == RASTER else preset
                processor = PSAProcessor(pipe, preset, strict=True)
                processor.install()
            if compiled:
                compile_blocks(transformer, machine.backend)
            ms, peak, first = clock(lambda: transformer(**inputs, return_dict=False)[0], repeats, machine)
            figures = {"ms": round(ms, 2), "peak_gib": peak, "first_s": round(first, 1)}
            if processor:
                stats = processor.stats()
                figures |= {"density": round(stats.density_sparse, 4), "implementation": stats.implementation}
            return figures
        finally:
            if processor:
                processor.restore()
            for module in transformer.modules():
                module._compiled_call_impl = None
            torch._dynamo.reset()


def clock(call: Callable[[], torch.Tensor], repeats: int, machine: Machine) -> tuple[float, float | None, float]:
    """Median milliseconds, peak memory in GiB (weights included), seconds of the first call.

    Raises:
        RuntimeError: the result is not finite.
    """
    start = time.perf_counter()
    if not bool(call().isfinite().all()):
        raise RuntimeError("the output is not finite")
    first = time.perf_counter() - start
    if machine.tiny:
        return first * 1000, None, first
    return *repeated(call, repeats), first


def block_error(transformer: torch.nn.Module, inputs: dict[str, Any], machine: Machine) -> float:
    """How far the self-attention of the first block, everything kept, is from dense: relative L2.

    The block runs whole, but what it adds to the video is smaller than what bfloat16 rounds, with these weights.

    Raises:
        RuntimeError: not everything was kept.
    """

    class ReachedError(Exception):
        pass

    def run_alone(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        module.forward(*args, **kwargs)
        raise ReachedError

    attn = next(iter(find_family(transformer).self_attentions(transformer).values()))
    block = next(module for module in transformer.modules() if attn in module.children())
    pipe = OneStep(transformer, inputs)
    processor = PSAProcessor(pipe, scaled_preset(machine, 1.0), strict=True)
    outputs: list[torch.Tensor] = []
    hooks = [
        attn.register_forward_hook(lambda module, args, result: outputs.append(first(result).float())),
        block.register_forward_pre_hook(run_alone, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            for patch in (lambda: None, processor.install):
                patch()
                with contextlib.suppress(ReachedError):
                    transformer(**inputs)
        density = processor.stats().density_sparse
    finally:
        for hook in hooks:
            hook.remove()
        processor.restore()
    if density != 1:
        raise RuntimeError(f"the density of a block that keeps everything is {density}, not 1")
    dense, sparse = outputs
    return relative_error(sparse, dense)


def compile_blocks(transformer: torch.nn.Module, backend: str) -> None:
    """Its blocks as whole graphs."""
    regional.compile_blocks(transformer, backend=backend, fullgraph=True)


def project(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with the seconds of a run of 50 steps.

    A sparse run begins with psa-3's dense steps, at the time of the fastest dense method measured beside it; where none
    was, it has no projection.
    """
    dense_steps = math.ceil(0.25 * STEPS)
    for row in rows:
        if "ms" not in row:
            continue
        beside = [
            other["ms"]
            for other in rows
            if not is_sparse(other["method"]) and "ms" in other and _case(other) == _case(row)
        ]
        dense = min(beside, default=None) if is_sparse(row["method"]) else row["ms"]
        if dense is not None:
            step = dense_steps * dense + (STEPS - dense_steps) * row["ms"]
            row["run_50_steps_s"] = round(step * row["branches"] / 1000, 1)
    return rows


def merge(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier run that were not measured again, and the new ones; an error replaces no figure."""

    def key(row: dict[str, Any]) -> tuple:
        return (*_case(row), row["method"], row.get("asked", round(row["density"], 2)))

    measured = {key(row) for row in earlier if "ms" in row}
    rows = [row for row in rows if "ms" in row or key(row) not in measured]
    again = {key(row) for row in rows}
    return [row for row in earlier if key(row) not in again] + rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| workload | method | density | compiled | ms | peak GiB | 50 steps, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["workload"], row["method"], f"{row['density']:.3f}", "yes" if row["compiled"] else "no"]
        figures = [row.get("ms", row.get("error")), row.get("peak_gib"), row.get("run_50_steps_s")]
        cells += ["" if figure is None else str(figure) for figure in figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple[str, bool]:
    return row["workload"], row["compiled"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all")
    parser.add_argument("--method", nargs="+", choices=(*METHODS, RASTER), help=f"default: {METHODS}")
    parser.add_argument("--density", nargs="+", type=float, help=f"of psa; default: {DENSITIES}")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--compiled", dest="compiled", action="store_const", const=(True,), help="compiled blocks only")
    modes.add_argument("--eager", dest="compiled", action="store_const", const=(False,), help="eager blocks only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes on the CPU: shows that it runs, measures nothing"
    )
    parser.add_argument("--merge", type=Path, help="JSON of an earlier run on the same machine, to complete")
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/model.json, and none with --tiny")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    options.compiled = options.compiled or (False, True)
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/model.json"
    return options


if __name__ == "__main__":
    main()
