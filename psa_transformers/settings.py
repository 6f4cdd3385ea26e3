"""What a preset means for a language model, which is causal and has no denoising steps."""

from __future__ import annotations

from dataclasses import replace

from psa_kernels import AttentionSpec
from psa_presets import Preset, PresetError
from psa_presets.errors import refusal, show, told_at

# Exact in every row, beside its diagonal: the block in which attention sinks are, and those just before the diagonal.
KEEP_FIRST, KEEP_LAST = 1, 2


def causal_specs(preset: Preset, layers: int) -> tuple[AttentionSpec | None, ...]:
    """What each layer of a decoder computes; None is a layer that the preset's rules for layers keep dense.

    Rules, levels, thresholds, density, block sizes, estimators, `rest`, `similarity` and rules for layers mean what
    they mean elsewhere. Keys that concern only denoising have no effect: dense steps, rules for steps, `refresh`,
    `share_guidance`, `correction`, `dense_attention`. Neither has `order`, because causal blocks are cut in the order
    of the tokens, nor `min_tokens`, because `apply_psa` has its own.

    Raises:
        PresetError: the preset keeps every step dense; or causal attention has no such precision, block sizes or
            levels; or as `Preset.layer_specs`.
    """
    specs = preset.layer_specs(layers)
    with told_at(f"preset {show(preset.name)}"):
        if preset.is_all_dense:
            beside = "with the rules for steps, " if preset.steps else ""
            raise refusal("dense_steps", preset.dense_steps, f"{beside}nothing would be sparse", "fewer dense steps")
        return tuple(None if spec is None else _causal(spec) for spec in specs)


def check_sparse(preset: Preset, layers: int) -> None:
    """Check that a preset can be used for a decoder with so many layers, and leaves one of them sparse.

    Raises:
        PresetError: as `causal_specs`, or all layers are dense.
    """
    if all(spec is None for spec in causal_specs(preset, layers)):
        problem = (
            f"layers: these rules keep all {layers} layers of the model dense; allowed: rules that leave one sparse"
        )
        raise PresetError(problem, f"preset {show(preset.name)}")


def _causal(spec: AttentionSpec) -> AttentionSpec:
    if spec.precision != "native":
        raise refusal("precision", spec.precision, "causal attention does not have it", "native")
    if spec.block_query % spec.block_key:
        reason = f"causal attention needs a multiple of block.key = {spec.block_key}"
        raise refusal("block.query", spec.block_query, reason, "such a multiple")
    if spec.levels[0] != 1:
        raise refusal("levels", spec.levels, "blocks beside the diagonal are exact", "levels that begin with 1")
    return replace(spec, keep_first=KEEP_FIRST, keep_last=KEEP_LAST)


def tower_spec(preset: Preset) -> AttentionSpec:
    """What all layers of a vision tower compute: the preset without its rules for layers, which are the decoder's."""
    (spec,) = preset.replace(layers=()).layer_specs(1)
    assert spec is not None  # only a rule for layers makes one dense
    return spec
