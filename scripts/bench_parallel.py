"""Time forwards of full-size transformers on several GPUs: `torchrun --nproc-per-node N scripts/bench_parallel.py`.

Needs CUDA devices, but for `--tiny`, which runs the same with gloo on the CPU. Weights are random and latents noise.
Every rank first runs the forward alone, then all share it by diffusers' context parallelism (Ulysses), dense and
sparse. A shared result that is not that of one GPU is an error. Rank 0 prints a table and writes JSON.

A row's `ms` is the slowest rank's median. `communication` is the share of it that collectives, copies to other ranks
and waiting for them take on the rank that waits least, beside other work too; `imbalance` by how much the rank with the
most work exceeds the mean; both from one profiled forward. `speedup` is against one GPU in the same run, `error` the
relative L2 distance from its result. Dense attention of HunyuanVideo has a mask on one GPU, as in stock diffusers, and
none on several, where the text's padding is cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_model import clock
from dense_attention import prefer_cudnn
from diffusers import ContextParallelConfig
from one_step import OneStep, scaled_preset
from random_models import WORKLOADS, Machine, Workload, build, compile_forwards, make_inputs
from results import publish
from torch.profiler import ProfilerActivity, profile

from psa_diffusers import Preset, PSAProcessor, context_parallel_plan
from psa_diffusers.patch.parallel.exchanges import Exchanges

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("wan2.1-14b-720p", "hunyuanvideo-720p", "cogvideox-5b")
METHODS = ("sdpa-cudnn", "psa")
EXCHANGE = ("memory", "collectives")
DENSITY = 0.15
# Relative L2; in bfloat16 the order of a sum shows, and so may a block whose importance is a near tie.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
# Names of what a profile has of NCCL, gloo, and copies between GPUs, of which local ones have no name of their own.
EXCHANGES = ("ncclDevKernel", "ncclKernel", "gloo:", "Memcpy PtoP", "Memcpy DtoD", "c10d::symmetric_memory::barrier")


def main() -> None:
    options = _arguments()
    machine = start(options.tiny)
    rows: list[dict[str, Any]] = []
    for name in options.workload or NAMES:
        for row in measure(WORKLOADS[name], options, machine):
            rows.append(row)
            if dist.get_rank() == 0:
                print(json.dumps(row), flush=True)
    if dist.get_rank() == 0:
        print(table(rows))
        what = "one forward of a whole transformer on one and on several devices, random weights, medians"
        publish(what, rows, options.output, device=machine.device, commit=options.commit)
    dist.destroy_process_group()


def start(tiny: bool) -> Machine:
    """Join the process group of torchrun; alone, make one of one rank."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29531")
    place = {name: int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))}
    if tiny:
        # diffusers numbers accelerators, of which a CPU has none.
        torch.accelerator.device_count = lambda: 1
        torch.set_num_threads(1)
    else:
        if not torch.cuda.is_available():
            raise SystemExit("bench_parallel: no CUDA device; --tiny runs a toy on the CPU")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("cpu:gloo" if tiny else "nccl", rank=place["RANK"], world_size=place["WORLD_SIZE"])
    if tiny:
        return Machine("cpu", torch.float32, "eager", True)
    return Machine("cuda", torch.bfloat16, "inductor", False)


def measure(workload: Workload, options: argparse.Namespace, machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of one workload: dense and sparse, on one device and on all."""
    torch.manual_seed(0)
    transformer = build(workload.checkpoint, machine)
    inputs = make_inputs(workload.checkpoint, transformer, machine, latents=workload.latents)
    sparse = scaled_preset(machine, options.density)
    methods = {"sdpa-cudnn": sparse.replace(dense_steps=1.0), "psa": sparse}
    methods = {name: preset for name, preset in methods.items() if name in options.method}
    compile_forwards(transformer, machine.backend)
    alone: dict[str, torch.Tensor] = {}
    alone_ms: dict[tuple[str, bool], float] = {}
    for gpus in sorted({1, dist.get_world_size()}):
        if gpus > 1:
            config = ContextParallelConfig(ulysses_degree=gpus, ulysses_anything=options.uneven)
            transformer.enable_parallelism(config=config, cp_plan=context_parallel_plan(transformer))
        exchanges = [None] if gpus == 1 else options.exchange
        for exchange, compiled, method in product(exchanges, options.compiled, methods):
            torch._dynamo.reset()
            with by(exchange), torch.compiler.set_stance("default" if compiled else "force_eager"):
                result, figures = run(transformer, inputs, methods[method], options.repeats, machine)
            figures["speedup"] = round(alone_ms.setdefault((method, compiled), figures["ms"]) / figures["ms"], 3)
            if gpus == 1:
                alone.setdefault(method, result)
            else:
                distance = (result.float() - alone[method].float()).norm() / alone[method].float().norm()
                figures["error"] = max(gather(float(distance)))
                if not figures["error"] <= TOLERANCE[machine.dtype]:
                    raise RuntimeError(f"{workload.name}, {method}: {gpus} ranks differ by {figures['error']:.1e}")
            found = {"workload": workload.name, "method": method, "gpus": gpus, "compiled": compiled, **figures}
            yield found if exchange is None else {**found, "exchange": exchange}


@contextmanager
def by(exchange: str | None) -> Iterator[None]:
    """Let ranks write into each other's memory where they can, or, with `collectives`, exchange by these alone."""
    chosen: Any = Exchanges
    make = chosen.make_memory
    if exchange == "collectives":
        chosen.make_memory = staticmethod(lambda group, device: None)
    try:
        yield
    finally:
        chosen.make_memory = staticmethod(make)


def run(
    transformer: torch.nn.Module, inputs: dict[str, Any], preset: Preset, repeats: int, machine: Machine
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The result of a forward on this rank, and figures of all ranks."""
    pipe = OneStep(transformer, inputs)  # the processor does not keep it
    processor = PSAProcessor(pipe, preset, strict=True)
    processor.install()

    def forward() -> torch.Tensor:
        return transformer(**inputs, return_dict=False)[0]

    with torch.no_grad(), prefer_cudnn() if preset.is_all_dense else nullcontext():
        dist.barrier()
        ms, peak, _ = clock(forward, repeats, machine)
        result, busy, collectives = profiled(forward, machine)
    stats = processor.stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the shared model needs a processor: it gets the next one
        processor.restore()
    slowest = max(gather(ms))
    work = gather(busy - collectives)
    figures = {
        "density": round(stats.density_run if stats.density_sparse is None else stats.density_sparse, 4),
        "ms": round(slowest, 2),
        "peak_gib": max(gather(peak)) if peak is not None else None,
        "communication": round(min(gather(collectives)) / max(gather(busy)), 4),
        "imbalance": round(max(work) / (sum(work) / len(work)) - 1, 4),
    }
    return result, figures


def profiled(forward: Callable[[], torch.Tensor], machine: Machine) -> tuple[torch.Tensor, float, float]:
    """The result of one forward; milliseconds of it and of the collectives in it, waiting included, on this rank."""
    activities = [ProfilerActivity.CPU] if machine.tiny else [ProfilerActivity.CUDA]
    dist.barrier()
    with profile(activities=activities) as trace:
        begin = time.perf_counter()
        result = forward()
        if not machine.tiny:
            torch.cuda.synchronize()
        busy = (time.perf_counter() - begin) * 1000
    found = [event for event in trace.key_averages() if event.key.startswith(EXCHANGES)]
    times = (event.cpu_time_total if machine.tiny else event.device_time_total for event in found)
    return result, busy, sum(times) / 1000


def gather(value: float) -> list[float]:
    """The value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with how many times as fast as on one GPU."""
    names = (
        "workload",
        "method",
        "blocks",
        "density",
        "GPUs",
        "exchange",
        "ms",
        "speedup",
        "peak GiB",
        "communication",
        "imbalance",
    )
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row in rows:
        blocks = "compiled" if row["compiled"] else "eager"
        cells = [row["workload"], row["method"], blocks, f"{row['density']:.3f}", row["gpus"]]
        cells += [row.get("exchange", ""), row["ms"]]
        cells += [f"{row['speedup']:.2f}", row["peak_gib"] or "", row["communication"], row["imbalance"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, help=f"default: {' '.join(NAMES)}")
    parser.add_argument("--density", type=float, default=DENSITY, help="of psa; default: %(default)s")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--compiled", dest="compiled", action="store_const", const=(True,), help="compiled blocks only")
    modes.add_argument("--eager", dest="compiled", action="store_const", const=(False,), help="eager blocks only")
    parser.set_defaults(compiled=(False, True))
    parser.add_argument(
        "--uneven", action="store_true", help="diffusers' ulysses_anything: numbers of tokens that GPUs do not divide"
    )
    parser.add_argument("--exchange", nargs="+", choices=EXCHANGE, default=EXCHANGE[:1], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes on the CPU: shows that it runs, measures nothing"
    )
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks/parallel.json, and none with --tiny")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if options.output is None and not options.tiny:
        options.output = ROOT / "docs/benchmarks/parallel.json"
    return options


if __name__ == "__main__":
    main()
