"""Time one forward without and with CUDA graphs: dense and sparse, lists made and kept, and compare with eager.

    python scripts/bench_graphs.py --output docs/benchmarks/graphs.json

Needs a CUDA device, but for `--tiny`, which runs the eager rows of toys on the CPU. One block of each kind at full size
and a whole small transformer, random weights. `eager`; blocks compiled (`compiled`); the same with CUDA graphs
(`reduce-overhead`); and a forward captured by hand (`captured`). `difference` is the largest absolute difference from
the eager output of the same phase. A row that cannot be has `error` instead. Writes JSON, and a table beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from gpu_clock import captured
from random_models import WAN_1_3B, WORKLOADS, Machine, build, make_inputs, pick_machine
from results import document, write

from psa_diffusers import PSAProcessor, load_preset
from psa_testing.families import NETWORKS, PUBLISHED

WHAT = "one forward, random weights, medians"
STEPS = [1000.0, 800.0, 600.0, 20.0]
# Phase: step, and whether the lists serve a second step. The last one reads those that step 2 made.
PHASES = {"dense": (0, False), "sparse, lists made": (2, False), "sparse, lists kept": (3, True)}
MODES = ("eager", "compiled", "reduce-overhead", "captured")
MODELS = ("wan2.1-1.3b-480p", "hunyuanvideo-720p", "cogvideox-5b")
SMALL = "wan, small"


class Pipeline:
    """What the processor asks of a pipeline; its steps are stated."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer, self.scheduler = transformer, None


def main() -> None:
    options = _arguments()
    machine = pick_machine(options.tiny, "bench_graphs")
    rows: list[dict[str, Any]] = []
    for name in options.model or (SMALL, *MODELS):
        for row in rows_of(name, machine, options.repeats):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                write(document(WHAT, rows, device=machine.device, commit=options.commit), options.output)
                options.output.with_suffix(".md").write_text(table(rows))
    print(table(rows))


@torch.no_grad()
def rows_of(name: str, machine: Machine, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    torch.manual_seed(0)
    transformer, inputs = model(name, machine)
    small = {"block": {"query": 32, "key": 16}} if machine.tiny else {}
    for phase, (step, kept) in PHASES.items():
        preset = load_preset("psa-3").replace(dense_steps=0.5, min_tokens=0, refresh=2 if kept else 1, **small)
        wanted = None
        for mode in MODES if not machine.tiny else MODES[:1]:
            row: dict[str, Any] = {"model": name, "phase": phase, "mode": mode}
            try:
                output, row["ms"] = run(transformer, inputs, preset, step, mode, repeats)
                wanted = output if wanted is None else wanted
                row["difference"] = float((output.float() - wanted.float()).abs().max())
            except Exception as error:  # what cannot be captured is a fact to report
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield row
            torch._dynamo.reset()
            gc.collect()
            if not machine.tiny:
                torch.cuda.empty_cache()


def model(name: str, machine: Machine) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A transformer and the arguments of its forward."""
    if name == SMALL:
        transformer = build(WAN_1_3B, machine, num_layers=4, num_attention_heads=4, ffn_dim=1024)
        inputs = make_inputs(WAN_1_3B, transformer, machine, latents=(1, 16, 8, 60, 64))
    else:
        workload = WORKLOADS[name]
        published = next(each for each in PUBLISHED if each.checkpoint == workload.checkpoint)
        transformer = build(workload.checkpoint, machine, **NETWORKS[published.model].one_block)
        inputs = make_inputs(workload.checkpoint, transformer, machine, latents=workload.latents, sizes=workload.sizes)
    return transformer, {**inputs, "return_dict": False}


def run(
    transformer: Any, inputs: dict[str, Any], preset: Any, step: int, mode: str, repeats: int
) -> tuple[torch.Tensor, float]:
    """The output and median milliseconds of a forward."""
    processor = PSAProcessor(Pipeline(transformer), preset)
    processor.install()
    blocks = [block for each in transformer.children() if isinstance(each, torch.nn.ModuleList) for block in each]
    mask = inputs.get("encoder_attention_mask")
    text = None if mask is None else mask.sum(1).tolist()
    try:
        if mode in ("compiled", "reduce-overhead"):
            for block in blocks:
                block.compile(mode="default" if mode == "compiled" else mode)
        with processor.run(STEPS):
            for before in range(2, step):  # makes the lists that this step reads
                with processor.step(before, text_tokens=text):
                    forward_of(transformer, inputs, "eager" if mode == "captured" else mode)()
            with processor.step(step, text_tokens=text):
                return timed(forward_of(transformer, inputs, mode), repeats)
    finally:
        processor.restore()
        for block in blocks:
            block._compiled_call_impl = None


def forward_of(transformer: Any, inputs: dict[str, Any], mode: str) -> Callable[[], torch.Tensor]:
    """What is timed."""

    def forward() -> torch.Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        return transformer(**inputs)[0]

    return captured(forward) if mode == "captured" else forward


def timed(forward: Callable[[], torch.Tensor], repeats: int) -> tuple[torch.Tensor, float]:
    """The output, and median milliseconds until the device is done, after three forwards to warm up."""
    times = []
    for turn in range(3 + repeats):
        wait()
        start = perf_counter()
        output = forward()
        wait()
        if turn >= 3:
            times.append(perf_counter() - start)
    return output.clone(), round(1e3 * median(times), 3)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | phase | mode | ms | largest difference from eager |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"| {row['ms']} | {row['difference']:.1e} |" if "ms" in row else f"| | {row['error']} |"
        lines.append(f"| {row['model']} | {row['phase']} | {row['mode']} {figures}")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=(SMALL, *MODELS), help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--tiny", action="store_true", help="toys on the CPU, eager rows only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
