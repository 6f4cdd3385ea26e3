"""One block of each kind of a published transformer, dense and sparse: what must be equal, how far the rest is off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from comparing import first, relative_error
from gpu_clock import repeated
from one_step import OneStep, scaled_preset
from random_models import Machine, build, make_inputs, published_models

from psa_diffusers import Preset, PSAProcessor
from psa_diffusers.families import find_family
from psa_testing.families import NETWORKS
from psa_testing.full_size import head_count, query_projection

PADDING = 0.75
# Relative L2 of attention that keeps everything. bfloat16 rounds by up to 0.4 %, and several times on the way.
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}


@dataclass
class Seen:
    """One forward: the model's output, and what each video self-attention gave for the video, first layer first."""

    output: torch.Tensor
    attention: list[torch.Tensor]

    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in (self.output, *self.attention))

    def equals(self, other: Seen) -> bool:
        return torch.equal(self.output, other.output) and all(map(torch.equal, self.attention, other.attention))

    def attention_error(self, other: Seen) -> float:
        """Relative L2 of the layer that is off the most; NaN if one is not finite."""
        errors = [relative_error(mine, theirs) for mine, theirs in zip(self.attention, other.attention, strict=True)]
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def check(checkpoint: str, machine: Machine, repeats: int) -> dict[str, Any]:
    """The row of one checkpoint; `failed` names what does not hold."""
    torch.manual_seed(0)
    published = published_models()[checkpoint]
    transformer = build(checkpoint, machine, **NETWORKS[published.model].one_block)
    inputs = make_inputs(checkpoint, transformer, machine, padding=PADDING)
    psa3, everything = scaled_preset(machine, 0.25), scaled_preset(machine, 1.0)
    with torch.no_grad():
        row = _shape(transformer, inputs)
        dense = observe(transformer, inputs)
        with patched(transformer, inputs, psa3, step=0) as processor:
            row["identical"] = observe(transformer, inputs).equals(dense)
            phase_is_dense = processor.stats().density_run == 1 and not processor.stats().fallbacks
        with patched(transformer, inputs, everything) as processor:
            kept = observe(transformer, inputs)
            row["kept_density"] = processor.stats().density_sparse
        row["kept_error"] = kept.attention_error(dense)
        row["kept_output_error"] = relative_error(kept.output, dense.output)
        del kept
        with patched(transformer, inputs, psa3) as processor:
            sparse = observe(transformer, inputs)
            row["finite"] = dense.finite() and sparse.finite()
            row["psa_error"] = sparse.attention_error(dense)
            row["psa_output_error"] = relative_error(sparse.output, dense.output)
            del dense
            row |= _text_changes(transformer, inputs, sparse)
            del sparse
            row["psa_ms"], row["psa_peak_gib"] = _clock(lambda: transformer(**inputs), repeats, machine)
            stats = processor.stats()
        row["dense_ms"], row["dense_peak_gib"] = _clock(lambda: transformer(**inputs), repeats, machine)
    row |= {
        "density": stats.density_sparse,
        "implementation": stats.implementation,
        "fallbacks": sorted(stats.fallbacks),
    }
    row["failed"] = failures(row, phase_is_dense, TOLERANCE[machine.dtype])
    return row


def failures(row: dict[str, Any], phase_is_dense: bool, tolerance: float) -> list[str]:
    """What does not hold in a row, in words."""
    conditions = {
        "the dense phase is bit-identical to stock": phase_is_dense and row["identical"],
        "everything is kept at thresholds of 1": row["kept_density"] > 1 - 1e-6,
        "attention that keeps everything equals dense to rounding": row["kept_error"] <= tolerance,
        "the output that keeps everything equals dense to rounding": row["kept_output_error"] <= tolerance,
        "all is finite": row["finite"],
        "psa-3 differs from dense": row["psa_error"] > row["kept_error"],
        "every sparse call is sparse": not row["fallbacks"] and row["density"] is not None and row["density"] < 1,
        "padded text changes nothing": row["padding_change"] in (None, 0),
        "real text changes something": row["text_change"] is None or row["text_change"] > 0,
    }
    return [name for name, holds in conditions.items() if not holds]


@contextmanager
def patched(
    transformer: torch.nn.Module, inputs: dict[str, Any], preset: Preset, **where: Any
) -> Iterator[PSAProcessor]:
    """The transformer with PSA, at a step of the run."""
    pipe = OneStep(transformer, inputs, **where)  # the processor does not keep it
    processor = PSAProcessor(pipe, preset)
    processor.install()
    try:
        yield processor
    finally:
        processor.restore()


def observe(transformer: torch.nn.Module, inputs: dict[str, Any]) -> Seen:
    """Run one forward and keep what its self-attentions gave."""
    attention: list[torch.Tensor] = []
    modules = find_family(transformer).self_attentions(transformer).values()
    hooks = [
        module.register_forward_hook(lambda module, args, result: attention.append(first(result).detach().clone()))
        for module in modules
    ]
    try:
        return Seen(transformer(**inputs, return_dict=False)[0], attention)
    finally:
        for hook in hooks:
            hook.remove()


def _clock(call: Callable[[], Any], repeats: int, machine: Machine) -> tuple[float | None, float | None]:
    """Median milliseconds and peak memory in GiB of calls that ran before; neither is measured on a toy."""
    return (None, None) if machine.tiny else repeated(call, repeats)


def _shape(transformer: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What of the model was run."""
    family = find_family(transformer)
    attentions = family.self_attentions(transformer)
    grid = family.token_grid(transformer, inputs)
    heads = head_count(next(iter(attentions.values())))
    # Not of the configuration, which names no head dimension in some models.
    width = query_projection(next(iter(attentions.values()))).out_features
    masks = [value for name, value in inputs.items() if name.startswith("encoder_attention_mask")]
    return {
        "model": type(transformer).__name__,
        "attentions": list(attentions),
        "heads": heads,
        "head_dim": width // heads,
        "grid": list(grid),
        "tokens": math.prod(grid),
        "text_position": family.text,
        "padded_text_tokens": int(sum((mask == 0).sum() for mask in masks)) if masks else None,
    }


def _text_changes(transformer: torch.nn.Module, inputs: dict[str, Any], before: Seen) -> dict[str, float | None]:
    """How much other values in all padded, and in all real, text tokens change; None where no text is padded."""
    changes: dict[str, float | None] = {"padding_change": None, "text_change": None}
    masks = {name: mask.bool() for name, mask in inputs.items() if name.startswith("encoder_attention_mask")}
    for figure, real in (("padding_change", False), ("text_change", True)):
        if not masks:
            break
        other = dict(inputs)
        for name, mask in masks.items():
            text = name.replace("attention_mask", "hidden_states")
            changed = torch.randn_like(inputs[text])
            other[text] = torch.where((mask == real)[..., None], changed, inputs[text])
        after = observe(transformer, other)
        changes[figure] = max(after.attention_error(before), relative_error(after.output, before.output))
    return changes
