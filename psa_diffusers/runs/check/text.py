"""A check as plain text, of lines that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from psa_diffusers.environment import compiled_kernels_folder, hardware, versions
from psa_diffusers.runs.check.check import Check, Expert
from psa_diffusers.runs.check.costs import Uses, list_bytes, pyramid_bytes
from psa_diffusers.runs.check.machine import Offer, Trial
from psa_diffusers.runs.check.network import Network
from psa_diffusers.runs.plan import Plan
from psa_diffusers.runs.ranges import ranges
from psa_kernels.costs import expected_density

WIDTH, LABEL = 92, 16
ESTIMATE = (
    "an estimate from the configuration, not a measurement: kernels reach different shares of a device's peak. "
    "Measured figures are in docs/benchmarks"
)
UNSEEN = (
    "attention masks other than text padding, and inputs that do not tell the video's size, show only in a run; it "
    "warns of what it runs dense, and --strict makes that an error"
)


def as_text(check: Check) -> str:
    """The whole text; no line is longer than `WIDTH` unless a single word is."""
    lines: list[str] = []
    for label, text in _rows(check):
        if not label and not text:
            lines.append("")
            continue
        wrapped = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{label if number == 0 else '':<{LABEL}}{line}" for number, line in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)


def _rows(check: Check) -> Iterator[tuple[str, str]]:
    plan = check.plan
    yield from _machine(plan)
    yield "", ""
    yield from _model(plan)
    for expert in check.experts:
        yield "", ""
        if len(check.experts) > 1:
            yield "For", f"pipe.{expert.network.name}"
        yield from _network(plan, expert.network)
        yield from _expert(plan, expert, check.trials)
    if plan.preset is not None:
        yield "", ""
        yield "Not seen here", UNSEEN


def _machine(plan: Plan) -> Iterator[tuple[str, str]]:
    found = versions()
    missing = "" if "triton" in found else ", triton not installed"
    yield "Software", ", ".join(f"{name} {number}" for name, number in found.items()) + missing
    about = hardware(plan.settings.device)
    yield "Machine", f"{about['processor']}, {about['cores']} cores, {about.get('memory_gib', '?')} GiB of memory"
    if "gpu" in about:
        import torch

        major, minor = torch.cuda.get_device_capability(plan.settings.device)
        gpu = f"{about['gpu']}, {about['gpu_memory_gib']} GiB, compute capability {major}.{minor}"
        yield "Device", f"{plan.settings.device}: {gpu}, CUDA {about['cuda']}"
    else:
        yield "Device", f"{plan.settings.device}, {about['threads']} threads"


def _model(plan: Plan) -> Iterator[tuple[str, str]]:
    settings, model = plan.settings, plan.model
    name = model.name if settings.source in (model.name, "bundled") else f"{model.name} ({settings.source})"
    yield "Model", f"{name}, a {settings.pipeline}" + (" with two transformers" if model.experts == 2 else "")
    size = f"{settings.frames} frames of {settings.height} x {settings.width}"
    extra = " (an image would decide the size)" if model.kind.begins_with_image and plan.image is None else ""
    yield "Video", f"{size}{extra}, {plan.steps} denoising steps, {settings.dtype}"
    if settings.cuda_graphs:
        yield "Forwards", "replayed as CUDA graphs where they can be captured, each kind from its second on"
    yield "Weights", "neither read nor downloaded, those of LoRAs neither"


def _network(plan: Plan, network: Network) -> Iterator[tuple[str, str]]:
    import torch

    gib = network.parameters * getattr(torch, plan.settings.dtype).itemsize / 2**30
    large = network.parameters >= 1e8
    count, unit = network.parameters / (1e9 if large else 1e6), "billion" if large else "million"
    size = f"{count:.2f} {unit} weights, {gib:.2f} GiB"
    yield "Transformer", f"{network.kind} ({network.family.name}), {size}"
    shape, others = network.shape, len(set(network.shapes)) - 1
    heads = f"{shape.heads} heads" + ("" if shape.kv_heads == shape.heads else f" ({shape.kv_heads} of keys)")
    kinds = f", in others of {others} other kinds" if others else ""
    yield "Self-attention", f"{len(network.layers)} layers, {heads} of head_dim {shape.head_dim}{kinds}"
    grid = " x ".join(map(str, network.grid))
    beside = {"none": "", "before": ", after those of the text", "after": ", before those of the text"}
    yield "Tokens", f"{network.tokens:,} of the video, {grid}{beside[network.family.text]}"
    if network.family.history or network.family.appended:
        yield "", "those of earlier frames or conditions beside them are attended exactly, and not counted below"


def _expert(plan: Plan, expert: Expert, trials: dict[str, Trial]) -> Iterator[tuple[str, str]]:
    preset = expert.preset
    if preset is None:
        yield "Preset", "dense: the pipeline's own attention, nothing is patched"
        return
    about = f": {preset.source}" if preset.source else ""
    yield "Preset", f"{preset.name}{about}"
    sparse = preset.sparse_steps(plan.steps)
    yield "Dense phase", _dense_phase(plan.steps, sparse)
    yield from _dense_layers(expert)
    offers = [offered for _, offered in expert.uses if offered is not None]
    if offers:
        yield "Density", _density(expert)
        yield from _offers(expert.uses, trials)
        yield "Memory", _memory(expert, offers)
    yield "Speed-up", _speedup(expert, bool(sparse))


def _dense_phase(steps: int, sparse: Sequence[int]) -> str:
    dense = [at + 1 for at in range(steps) if at not in sparse]
    if not dense:
        return f"none: all {steps} steps are sparse"
    if not sparse:
        return f"all {steps} steps, so that nothing is sparse; fewer dense_steps in the preset change that"
    which = "step" if len(dense) == 1 else "steps"
    return f"{len(dense)} of {steps} steps are dense by the preset ({which} {ranges(dense)})"


def _dense_layers(expert: Expert) -> Iterator[tuple[str, str]]:
    network = expert.network
    if "" in network.dense_layers:
        yield "Falls back", f"all layers run dense: {network.dense_layers['']}"
        return
    by_reason: dict[str, list[int]] = {}
    for index, name in enumerate(network.layers):
        if name in network.dense_layers:
            by_reason.setdefault(network.dense_layers[name], []).append(index)
    for reason, layers in by_reason.items():
        yield "Falls back", f"layers {ranges(layers)} run dense: {reason}"
    for usage, offered in expert.uses:
        told = [index for layers in by_reason.values() for index in layers]
        by_preset = [index for index in usage.layers if index not in told]
        if usage.layer is None and by_preset:
            yield "Dense layers", f"{ranges(by_preset)}, as rules of the preset say"
        if offered is not None and offered.dense:
            yield "Falls back", f"layers {ranges(usage.layers)} run dense: {offered.dense}"
        if offered is not None and offered.hardly:
            yield "Little work", f"layers {ranges(usage.layers)}: {offered.hardly}"


def _density(expert: Expert) -> str:
    if expert.density is None:
        return "depends on the video: the preset keeps what holds a share of the attention"
    shares = [
        f"{expected_density(offered.call.spec, offered.call.key_blocks):.3f}"
        for _, offered in expert.uses
        if offered is not None and not offered.dense
    ]
    if not shares:
        return "1: no layer is sparse"
    mean = f"{expert.density:.3f} expected of sparse steps, as a share of dense attention's work"
    return mean if len(set(shares)) == 1 and shares[0] == f"{expert.density:.3f}" else f"{mean}; {_each(shares)}"


def _each(shares: Sequence[str]) -> str:
    return f"of sparse layers alone {' and '.join(dict.fromkeys(shares))}"


def _offers(uses: Uses, trials: dict[str, Trial]) -> Iterator[tuple[str, str]]:
    told: dict[str, None] = {}
    several = sum(offered is not None for _, offered in uses) > 1
    for usage, offered in uses:
        if offered is None or offered.dense:
            continue
        where = f" for layers {ranges(usage.layers)}" if several else ""
        yield "Implementation", f"{offered.backend.name}{where}"
        for reason in dict.fromkeys(reason for _, reason in offered.passed_over):
            line = f"not {', '.join(name for name, why in offered.passed_over if why == reason)}: {reason}"
            if line not in told:
                told[line] = None
                yield "", line
        if offered.backend.name not in told:
            told[offered.backend.name] = None
            yield from _first_call(offered, trials.get(offered.backend.name))


def _first_call(offered: Offer, trial: Trial | None) -> Iterator[tuple[str, str]]:
    if trial is None:
        yield "Kernels", f"PyTorch computes the {offered.backend.name}; nothing is compiled on this device"
    elif trial.problem is not None:
        yield "Kernels", f"a small call failed: {trial.problem}"
    else:
        yield "Kernels", "compile here; a small call agrees with the reference"
        yield (
            "First call",
            f"{trial.first:.1f} s for that small call, {trial.second:.4f} s for the next; compiled kernels are kept in "
            f"{compiled_kernels_folder()} and read by later processes. Kernels for other sizes may still be compiled",
        )


def _memory(expert: Expert, offers: Sequence[Offer]) -> str:
    used = [offered for offered in offers if not offered.dense]
    if not used:
        return "none beyond that of dense attention"
    pyramids = max(map(pyramid_bytes, used))
    parts = [f"pyramids of keys and values {_size(pyramids)} at once" if pyramids else "pyramids of one head at a time"]
    parts.append(f"lists of a call {_size(max(list_bytes(offered.call) for offered in used))}")
    if expert.kept_lists:
        parts.append(f"lists kept for later calls up to {_size(expert.kept_lists)} in all")
    if expert.corrections:
        parts.append(f"corrections {_size(expert.corrections)} in all")
    elif expert.preset is not None and expert.preset.correction and not expert.corrects:
        parts.append("no corrections, as the dense phase ends with a step of the other transformer")
    return ", ".join(parts) + "; for one video, beyond that of dense attention. Counted, not measured"


def _speedup(expert: Expert, any_sparse: bool) -> str:
    gain = expert.speedup
    if gain is None:
        known = any_sparse and expert.density is None and any(offered is not None for _, offered in expert.uses)
        return "not estimated, as the density depends on the video" if known else "none: nothing is sparse"
    return (
        f"by arithmetic alone {gain.step:.1f} x in a sparse step and {gain.run:.1f} x in all steps together, as "
        f"attention is {gain.attention:.0%} of a dense step's arithmetic or more; {ESTIMATE}"
    )


def _size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
