"""One setting of an experiment: a preset under a name, and the few ways in which experiments vary presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quality_lab.sol import SolAttention

from psa_diffusers import Preset, PresetError, load_preset

# The published rule of sampling, a quarter as dear to compute as that of strides 4 and 4.
SAMPLED = {"estimator": "sampled", "statistic": "max", "query_stride": 8, "key_stride": 8}


@dataclass(frozen=True)
class Setting:
    """What is measured once.

    Attributes:
        name: unique within the experiment.
        preset: what the pipeline is patched with.
        against: name of the setting whose PSNR this one's is compared with, prompt by prompt; its own for a baseline.
        series: settings of one series are joined in the plot.
        content: the kind of background that all prompts get; None leaves them as sampled.
        compute: what computes the calls that the preset wants sparse, if PSA does not; of the preset only the steps
            and layers that are dense count then.
    """

    name: str
    preset: Preset
    against: str
    series: str = ""
    content: str | None = None
    compute: SolAttention | None = None


def vary(base: str, **changes: Any) -> Preset:
    """A shipped preset with the importance that all experiments share, and what else is changed."""
    settings = load_preset(base).model_dump(exclude={"name", "source"})
    return Preset(**{**settings, "importance": SAMPLED, "min_tokens": 0, **changes})


def published(base: str) -> Preset:
    """A shipped preset as it is, for a video of any size."""
    return Preset(**{**load_preset(base).model_dump(exclude={"name", "source"}), "min_tokens": 0})


def at_density(density: float) -> tuple[float, ...]:
    """psa-3's thresholds at a density."""
    return load_preset("psa-3").at_density(density).thresholds


def vary_if_known(name: str, base: str, **changes: Any) -> Preset | None:
    """`vary`, or None with a printed line where this version's presets refuse one of the changes."""
    try:
        return vary(base, **changes)
    except PresetError as error:
        print(f"{name} is left out: {error}", flush=True)
        return None
