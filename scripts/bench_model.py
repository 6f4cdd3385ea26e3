"""Time whole forwards of full-size transformers, dense and sparse: `python scripts/bench_model.py`.

Needs a CUDA device, but for `--tiny`. Weights are random and latents are noise, which makes no difference to the time:
psa-3 allots shares of blocks, whatever the importance. One forward is one guidance branch. Before the timing, one block
that keeps everything is compared with the dense block. Prints a table; writes JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from random_models import WORKLOADS, Machine, Workload, build, make_inputs
from results import publish
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_diffusers import Preset, PSAProcessor, load_preset
from psa_diffusers.models import find_family

ROOT = Path(__file__).resolve().parents[1]
STEPS = 50
METHODS = ("sdpa-default", "sdpa-cudnn", "fa3", "psa")
DENSITIES = (0.25, 0.15, 0.10)
FA3_MODULE = "fa3_fwd_interface"


class OneStep:
    """What the processor asks of a pipeline: its transformer, and where it stands: at the last step, a sparse one."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer
        self.scheduler = SimpleNamespace(timesteps=torch.linspace(1000, 20, STEPS), step_index=STEPS - 1)


def main() -> None:
    options = _arguments()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("bench_model: no CUDA device; --tiny runs a toy on the CPU")
    machine = (
        Machine("cpu", torch.float32, "eager", True)
        if options.tiny
        else Machine("cuda", torch.bfloat16, "inductor", False)
    )
    rows: list[dict[str, Any]] = []
    for name in options.workload or WORKLOADS:
        for row in measure(WORKLOADS[name], options, machine):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.merge:
        rows = merge(json.loads(options.merge.read_text())["rows"], rows)
    project(rows)
    print(table(rows))
    publish("one forward of a whole transformer, random weights, medians", rows, options.output, device=machine.device)


def measure(workload: Workload, options: argparse.Namespace, machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of all methods on one workload."""
    torch.manual_seed(0)
    start = time.perf_counter()
    transformer = build(workload, machine)
    inputs = make_inputs(workload, transformer, machine)
    print(f"# {workload.name}: built in {time.perf_counter() - start:.1f} s", flush=True)
    if "psa" in (options.method or METHODS):
        error = block_error(transformer, inputs, machine)
        print(
            f"# {workload.name}: a block that keeps everything differs from dense by {error:.1e}",
            flush=True,
        )
    for compiled in options.compiled:
        for method in options.method or METHODS:
            for density in options.density or DENSITIES if method == "psa" else (1.0,):
                row = {"workload": workload.name, "method": method, "density": density, "compiled": compiled}
                row["branches"] = workload.branches
                try:
                    yield {**row, **run(transformer, inputs, method, density, compiled, options, machine)}
                except Exception as error:  # a peer that does not run here is a fact to report, not a reason to stop
                    if method == "psa" and machine.tiny:
                        raise
                    yield {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                    if not machine.tiny:
                        torch.cuda.empty_cache()


def run(
    transformer: torch.nn.Module,
    inputs: dict[str, Any],
    method: str,
    density: float,
    compiled: bool,
    options: argparse.Namespace,
    machine: Machine,
) -> dict[str, Any]:
    """Milliseconds and peak memory of one forward, and the density that it really had."""
    pipe = OneStep(transformer)
    processor = None
    with DENSE[method]() if method != "psa" else nullcontext(), torch.no_grad():
        try:
            if method == "psa":
                processor = PSAProcessor(pipe, scaled_preset(machine, density), strict=True)
                processor.install()
            if compiled:
                compile_blocks(transformer, machine.backend)
            ms, peak, first = clock(lambda: transformer(**inputs, return_dict=False)[0], options.repeats, machine)
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
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), round(torch.cuda.max_memory_allocated() / 2**30, 2), first


def block_error(transformer: torch.nn.Module, inputs: dict[str, Any], machine: Machine) -> float:
    """How far the self-attention of the first block, everything kept, is from dense: relative L2.

    The block runs whole, but what it adds to the video is smaller than what bfloat16 rounds, with these weights.
    """

    class ReachedError(Exception):
        pass

    def stop(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise ReachedError(args, kwargs)

    attn = next(iter(find_family(transformer).self_attentions(transformer).values()))
    block = next(module for module in transformer.modules() if attn in module.children())
    pipe = OneStep(transformer)
    processor = PSAProcessor(pipe, scaled_preset(machine, 1.0), strict=True)
    outputs: list[torch.Tensor] = []
    hook = attn.register_forward_hook(lambda module, args, result: outputs.append(_first(result).float()))
    with torch.no_grad():
        stopper = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            transformer(**inputs)
        except ReachedError as reached:
            args, kwargs = reached.args
        finally:
            stopper.remove()
        block(*args, **kwargs)
        processor.install()
        block(*args, **kwargs)
    hook.remove()
    assert processor.stats().density_sparse == 1
    processor.restore()
    dense, sparse = outputs
    return float((sparse - dense).norm() / dense.norm())


def compile_blocks(transformer: torch.nn.Module, backend: str) -> None:
    """diffusers' regional compilation, also for models that lack it."""
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True, backend=backend)


def prefer_cudnn() -> AbstractContextManager:
    """cuDNN wherever it serves a call."""
    order = (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
    return sdpa_kernel(list(order), set_priority=True)


@contextmanager
def flash_attention_3() -> Iterator[None]:
    """FlashAttention 3 for the self-attention of the video. It takes no mask; the one of HunyuanVideo is all true here.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    attention = importlib.import_module(FA3_MODULE).flash_attn_func

    @torch.library.custom_op(
        "psa_bench::fa3", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor", device_types="cuda"
    )
    def fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    @fa3.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q.new_empty(q.shape)

    original = F.scaled_dot_product_attention

    def replacement(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if query.shape == key.shape and query.shape[2] > 2048:
            return fa3(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        return original(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = replacement
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


DENSE: dict[str, Callable[[], AbstractContextManager]] = {
    "sdpa-default": nullcontext,
    "sdpa-cudnn": prefer_cudnn,
    "fa3": flash_attention_3,
}


def project(rows: list[dict[str, Any]]) -> None:
    """Add the seconds of a run of 50 steps to each row.

    A sparse run begins with psa-3's dense steps, at the time of the fastest dense method measured beside it; where none
    was, it has no projection.
    """
    dense_steps = math.ceil(0.25 * STEPS)
    for row in rows:
        if "ms" not in row:
            continue
        beside = [
            other["ms"] for other in rows if other["method"] != "psa" and "ms" in other and _case(other) == _case(row)
        ]
        dense = row["ms"] if row["method"] != "psa" else min(beside, default=None)
        if dense is not None:
            step = dense_steps * dense + (STEPS - dense_steps) * row["ms"]
            row["run_50_steps_s"] = round(step * row["branches"] / 1000, 1)


def merge(earlier: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier run that were not measured again, and the new ones."""

    def key(row: dict[str, Any]) -> tuple:
        return (*_case(row), row["method"], round(row["density"], 2))

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


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def scaled_preset(machine: Machine, density: float) -> Preset:
    """psa-3, whose density is 0.25, with its shares scaled; at density 1 everything is kept in full."""
    preset = load_preset("psa-3")
    thresholds = [1.0] * 3 if density == 1 else [t * density / 0.25 for t in preset.thresholds]
    small = {"min_tokens": 0, "block": {"query": 32, "key": 16}} if machine.tiny else {}
    return preset.model_copy(update={"thresholds": thresholds, **small})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help="default: all")
    parser.add_argument("--method", nargs="+", choices=METHODS, help="default: all")
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
    options = parser.parse_args()
    options.compiled = options.compiled or (False, True)
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/model.json"
    return options


if __name__ == "__main__":
    main()
