"""What lets a transformer alone be patched and run: a pipeline of one step, and psa-3 at any density."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from random_models import Machine

from psa_diffusers import Preset, load_preset
from psa_diffusers.families import find_family

STEPS = 50


class OneStep:
    """What the processor asks of a pipeline: its transformer, and where it stands.

    Args:
        transformer: the model.
        inputs: what its forward is given, by name, among it the step's timestep.
        step: of `STEPS`, counted from 0; by default the last one, which presets make sparse.
    """

    def __init__(self, transformer: torch.nn.Module, inputs: dict[str, Any], step: int = STEPS - 1) -> None:
        self.transformer = transformer
        timesteps = torch.linspace(1000, 20, STEPS)
        timesteps[step] = float(find_family(transformer).timestep(inputs).float().max())
        self.scheduler = SimpleNamespace(timesteps=timesteps, begin_index=0, step_index=step)


def scaled_preset(machine: Machine, density: float) -> Preset:
    """psa-3 at a density, with blocks that suit the machine; at density 1 everything is kept in full."""
    small = {"min_tokens": 0, "block": {"query": 32, "key": 16}} if machine.tiny else {}
    return load_preset("psa-3").at_density(density).replace(**small)
