"""What the patch costs the host beside stock diffusers, on toys whose attention is stubbed.

    python scripts/bench_patch.py

Runs on a CPU and needs no GPU: the figures are the time of Python and of launching small operations, and say nothing of
a device's work. The operator, PyTorch's dense attention and the correction give back a tensor that is there already, so
that what is left is diffusers and the patch. Whole runs of 16 steps are made, each step in both guidance branches.
`phase` is what the layers of a forward did: `dense`, `corrects` (the last dense step of a preset with a correction),
and sparse with lists `made` or `kept`. `us_call` is what one call of a self-attention takes longer than in the stock
model, the patch's own projections included; `us_patch` the same where projections, norms and rotations are stubbed in
both, so that the patch alone is left; `us_forward` what the hooks take around one forward, the look at its output
included. First quartiles of runs, stock and patched in turn, as other work on the machine only ever adds.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import gc
import json
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from random_models import build, make_inputs, pick_machine
from results import publish

from psa_diffusers import PSAProcessor, load_preset
from psa_diffusers.families import find_family
from psa_diffusers.patch import corrections, text_padding
from psa_kernels import psa_attention

WHAT = "host time that the patch adds to stock diffusers, microseconds, attention stubbed, toys on a CPU"
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "LTX-Video": ("Lightricks/LTX-Video", {"num_layers": 8}),
    "Wan": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", {"num_layers": 8}),
    "HunyuanVideo": ("hunyuanvideo-community/HunyuanVideo", {"num_layers": 3, "num_single_layers": 5}),
}
PRESETS = ("psa-3", "psa-auto")
PHASES = ("dense", "corrects", "made", "kept")
STEPS, BRANCHES = 16, 2
PADDING = 0.5  # share of text that is padding, where a model is told which


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    rows = []
    for family in options.family:
        for preset in options.preset:
            for row in measure(family, preset, options.runs, options.profile):
                rows.append(row)
                print(json.dumps(row), flush=True)
    publish(WHAT, rows, options.output, steps=STEPS, branches=BRANCHES, runs=options.runs)


def measure(family: str, preset: str, runs: int, profiled: bool = False) -> list[dict[str, Any]]:
    """The rows of one model and preset, one a phase."""
    torch.manual_seed(0)
    checkpoint, layers = MODELS[family]
    machine = pick_machine(True, "bench_patch")
    toy = Toy(build(checkpoint, machine, **layers), preset)
    inputs = make_inputs(checkpoint, toy.transformer, machine, padding=PADDING)
    profile = cProfile.Profile() if profiled else None
    with torch.no_grad(), attention_stubbed():
        calls, hooks = toy.times(inputs, runs)
        with projections_stubbed(toy.transformer):
            bare, _ = toy.times(inputs, runs, profile)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    rows = []
    for phase in PHASES:
        if phase in calls:
            figures = {
                "us_call": calls[phase] - calls["stock"],
                "us_patch": bare[phase] - bare["stock"],
                "us_forward": hooks[phase],
                "us_stock_call": calls["stock"],
            }
            rows.append(
                {"family": family, "preset": preset, "phase": phase}
                | {name: round(seconds * 1e6, 1) for name, seconds in figures.items()}
            )
    return rows


class Pipe:
    """What the processor asks of a pipeline."""

    scheduler: Any = None

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.transformer = transformer


class Toy:
    """A transformer that runs as it is and patched, in turn."""

    def __init__(self, transformer: torch.nn.Module, preset: str) -> None:
        self.transformer = transformer
        self._attentions = list(find_family(transformer).self_attentions(transformer).values())
        self._preset = load_preset(preset).replace(min_tokens=0, block={"query": 32, "key": 16})

    def times(
        self, inputs: dict[str, Any], runs: int, profile: cProfile.Profile | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of one call of a self-attention, and of the patch's hooks in one forward; by phase.

        The profile is of patched forwards.
        """
        calls, hooks = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for run in range(runs + 1):
            gc.collect()
            pipe = Pipe(self.transformer)
            for patched in (False, True):
                processor = PSAProcessor(pipe, self._preset)
                if patched:
                    processor.install()
                with ExitStack() as stack:
                    around = stack.enter_context(hooks_timed(self.transformer))
                    each = [stack.enter_context(calls_timed(attn)) for attn in self._attentions]
                    for phase in self._run(inputs, pipe, profile if run and patched else None):
                        if run:  # the first one fills caches
                            phase = phase if patched else "stock"
                            calls[phase] += [seconds for times in each for seconds in times]
                            hooks[phase].append(sum(around))
                        for times in (around, *each):
                            times.clear()
                processor.restore()
        return {phase: _quartile(calls[phase]) for phase in calls}, {phase: _quartile(hooks[phase]) for phase in hooks}

    def _run(self, inputs: dict[str, Any], pipe: Pipe, profile: cProfile.Profile | None) -> Iterator[str]:
        """The phase of each forward of a run."""
        timesteps = torch.linspace(1000, 20, STEPS)
        for step in range(STEPS):
            pipe.scheduler = SimpleNamespace(timesteps=timesteps, begin_index=0, step_index=step)
            given = {**inputs, "hidden_states": inputs["hidden_states"] + step, "timestep": timesteps[step].expand(1)}
            for _ in range(BRANCHES):
                CALLS.clear()
                if profile is not None:
                    profile.enable()
                self.transformer(**given)
                if profile is not None:
                    profile.disable()
                yield _phase()


def _quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


CALLS: list[str] = []  # what the stubs computed in this forward


def _phase() -> str:
    return next((phase for phase in ("corrects", "made", "kept") if phase in CALLS), "dense")


@contextmanager
def attention_stubbed() -> Iterator[None]:
    """Attention gives back its queries, with the statistics and lists of the first call of the kind."""
    known: dict[Any, Any] = {}

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Any, **options: Any) -> Any:
        CALLS.append("made" if options.get("lists") is None else "kept")
        key = q.shape, spec, options["text_after"], options["return_lists"]
        if key not in known:
            known[key] = psa_attention(q, k, v, spec, **options)[1:]
        return q, *known[key]

    def dense(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return query

    def left_out(dense: torch.Tensor, sparse: torch.Tensor) -> str:
        CALLS.append("corrects")
        return "a correction"

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(text_padding, "psa_attention", operator))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", dense))
        stack.enter_context(mock.patch.object(corrections, "left_out", left_out))
        stack.enter_context(mock.patch.object(corrections.Corrections, "add", lambda *args: None))
        yield


@contextmanager
def projections_stubbed(transformer: Any) -> Iterator[None]:
    """Self-attentions project and rotate nothing either, be they stock or patched: they give back what they get."""
    family = find_family(transformer)
    attentions = family.self_attentions(transformer).values()
    first = next(iter(attentions))
    known: dict[Any, Any] = {}

    def output(attn: Any, call: Any, video: torch.Tensor, text: torch.Tensor | None) -> Any:
        return call.hidden_states if text is None else (call.hidden_states, call.encoder_hidden_states)

    def project(attn: Any, call: Any) -> Any:
        key = call.hidden_states.shape, call.text_tokens
        if key not in known:
            known[key] = real(attn, call)
        return known[key]

    real = family.project
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(family, "project", staticmethod(project)))
        stack.enter_context(mock.patch.object(family, "output", staticmethod(output)))
        stock: Any = type(first.processor)
        inner = stock.__call__

        @functools.wraps(inner)  # diffusers passes on what the signature names
        def unchanged(self: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any):
            joint = family.text != "none" and encoder_hidden_states is not None
            return (hidden_states, encoder_hidden_states) if joint else hidden_states

        stack.enter_context(mock.patch.object(stock, "__call__", unchanged))
        yield


@contextmanager
def hooks_timed(transformer: torch.nn.Module) -> Iterator[list[float]]:
    """Collects the seconds that the other hooks of a module take, before and after its forward."""
    clock = Clock()
    handles = [
        transformer.register_forward_pre_hook(clock.start, prepend=True),
        transformer.register_forward_pre_hook(clock.stop),
        transformer.register_forward_hook(clock.start, prepend=True),
        transformer.register_forward_hook(clock.stop),
    ]
    try:
        yield clock.seconds
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_timed(module: torch.nn.Module) -> Iterator[list[float]]:
    """Collects the seconds of each forward of a module."""
    clock = Clock()
    handles = [module.register_forward_pre_hook(clock.start), module.register_forward_hook(clock.stop)]
    try:
        yield clock.seconds
    finally:
        for handle in handles:
            handle.remove()


class Clock:
    """Hooks that take the time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def start(self, *_: Any) -> None:
        self._begun = time.perf_counter()

    def stop(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--runs", type=int, default=8, help="of 16 steps each, patched and stock")
    parser.add_argument("--profile", action="store_true", help="print where the patched forwards' time goes")
    parser.add_argument("--output", type=Path, help="JSON file; none by default")
    return parser.parse_args()


if __name__ == "__main__":
    main()
