"""A model's scheduler as a run has it, and which of its steps each of two transformers takes."""

from typing import Any

from psa_diffusers.checkpoints.components import component_class
from psa_diffusers.checkpoints.configurations import index_file, read_json
from psa_diffusers.checkpoints.resolve import Model
from psa_diffusers.families.card import ModelCard, Part


def adjusted(scheduler: Any, card: ModelCard, flow_shift: float | None) -> Any:
    """A scheduler with a run's flow shift (None keeps its own) and the settings of the model's card."""
    settings = dict(card.scheduler)
    if flow_shift is not None:
        settings["flow_shift" if "flow_shift" in scheduler.config else "shift"] = flow_shift
    return type(scheduler).from_config(scheduler.config, **settings)


def first_expert_steps(model: Model, flow_shift: float | None, steps: int) -> int | None:
    """How many of the first of `steps` denoising steps call `transformer`; the others call `transformer_2`.

    No file but configurations is read or downloaded. None if they do not tell, as of any pipeline but Wan's.
    """
    if model.experts != 2:
        return None
    index = read_json(model.source, index_file(model.kind), model.card.revision)
    if "boundary_ratio" not in index:
        return None
    boundary = index["boundary_ratio"]
    if boundary is None:
        return steps
    try:
        library, name = index["scheduler"]
        part = Part("scheduler", library, name, model.source, "scheduler", model.card.revision)
        config = read_json(model.source, "scheduler/scheduler_config.json", model.card.revision)
        kind: Any = component_class(part)
        scheduler = adjusted(kind.from_config(config), model.card, flow_shift)
        scheduler.set_timesteps(steps)
        return int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())
    except Exception:  # schedulers raise anything, some because only a run gives what they need
        return None
