"""What a run would get here. Only configuration files are read, and on a GPU one small call is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from psa_diffusers.checkpoints.schedulers import first_expert_steps
from psa_diffusers.checkpoints.skeleton import transformer_skeletons
from psa_diffusers.errors import InputError
from psa_diffusers.families import UnsupportedModelError
from psa_diffusers.runs.check.costs import Speedup, correction_bytes, kept_list_bytes, mean_density, speedup
from psa_diffusers.runs.check.machine import Offer, Trial, offer, try_kernels
from psa_diffusers.runs.check.network import Network, Usage, read_network, usages
from psa_diffusers.runs.plan import Plan
from psa_presets import Preset


@dataclass(frozen=True)
class Expert:
    """One transformer of the model under its preset.

    Attributes:
        preset: None for a dense run.
        uses: the kinds of attention at sparse steps, each with what computes it, or None if it is dense.
        density: expected at a sparse step; None if it depends on the video or no step is sparse.
        kept_lists: bytes of lists that are kept for later calls.
        corrections: bytes of the corrections of all layers.
        corrects: whether the last step of its dense phase is its own, where corrections are found; True without any.
    """

    network: Network
    preset: Preset | None
    uses: tuple[tuple[Usage, Offer | None], ...] = ()
    density: float | None = None
    speedup: Speedup | None = None
    kept_lists: int = 0
    corrections: int = 0
    corrects: bool = True


@dataclass(frozen=True)
class Check:
    """All that `psa-generate --check` reports. `trials` has the backends' names as keys, and is empty on a CPU."""

    plan: Plan
    experts: tuple[Expert, ...]
    trials: dict[str, Trial]


def check_plan(plan: Plan) -> Check:
    """Look at a plan's model and machine; no weights are read or downloaded.

    Raises:
        InputError: the model's configuration shows that it cannot be loaded here.
    """
    settings, experts = plan.settings, []
    grid = plan.model.token_grid(settings.frames, settings.height, settings.width, with_image=plan.image is not None)
    for name, transformer in transformer_skeletons(plan.model).items():
        preset = plan.preset_2 if plan.preset_2 is not None and name == "transformer_2" else plan.preset
        try:
            network = read_network(name, transformer, grid, preset)
        except UnsupportedModelError as error:
            raise InputError(f"--model {plan.model.name}: {error}") from error
        experts.append(Expert(network, None) if preset is None else _expert(plan, network, preset))
    return Check(plan, tuple(experts), _trials(experts) if settings.device.startswith("cuda") else {})


def _expert(plan: Plan, network: Network, preset: Preset) -> Expert:
    settings, steps = plan.settings, plan.steps
    dtype = getattr(torch, settings.dtype)
    found: list[tuple[Usage, Offer | None]] = []
    for usage in usages(preset, network, steps):
        found.append((usage, None if usage.layer is None else offer(network, usage.layer, dtype, settings.device)))
    # Calls that no kernel serves stay with stock attention.
    sparse = [(usage, None if offered is None or offered.dense else offered) for usage, offered in found]
    density = mean_density(sparse)
    gain = None
    if density is not None and density < 1:
        gain = speedup(network, density, len(preset.sparse_steps(steps)), steps)
    guided = plan.model.kind.guided and settings.guidance > 1
    branches = 2 if guided else 1
    kept, corrects = kept_list_bytes(preset, sparse, branches), _corrects(plan, network.name, preset)
    corrections = correction_bytes(preset, sparse, branches) if corrects else 0
    return Expert(network, preset, tuple(found), density, gain, kept, corrections, corrects)


def _corrects(plan: Plan, name: str, preset: Preset) -> bool:
    """Whether a transformer runs at the last step of the dense phase, or may do so; True without corrections."""
    if not preset.correction:
        return True
    of_first = first_expert_steps(plan.model, plan.settings.flow_shift, plan.steps)
    dense = preset.dense_step_count(plan.steps)
    return of_first is None or not dense or (dense <= of_first) == (name == "transformer")


def _trials(experts: list[Expert]) -> dict[str, Trial]:
    """One small call with each backend that any layer gets."""
    trials: dict[str, Trial] = {}
    for expert in experts:
        for _, offered in expert.uses:
            if offered is not None and not offered.dense and offered.backend.name not in trials:
                trials[offered.backend.name] = try_kernels(offered, expert.network.shape)
    return trials
