"""The transformers of a model as its configuration files have them, without weights: on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.components import component_class, listed_parts, one_line
from psa_diffusers.checkpoints.configurations import index_file, read_json
from psa_diffusers.checkpoints.modular import listed_modular_parts
from psa_diffusers.checkpoints.resolve import Model, configuration
from psa_diffusers.errors import InputError
from psa_diffusers.families.card import Part

if TYPE_CHECKING:
    import torch

NAMES = ("transformer", "transformer_2")


def transformer_skeletons(model: Model) -> dict[str, torch.nn.Module]:
    """The transformers by their names in the pipeline; no file but configurations is read or downloaded.

    Raises:
        InputError: the installed diffusers or transformers lacks a class of the model, or a configuration is damaged.
    """
    import diffusers
    import torch

    pipeline_class = getattr(diffusers, model.card.pipeline, None)
    if pipeline_class is None:
        raise InputError(
            f"--model {model.name}: cannot be loaded: diffusers {diffusers.__version__} has no {model.card.pipeline}"
        )
    index = read_json(model.source, index_file(model.kind), model.card.revision)
    found: dict[str, torch.nn.Module] = {}
    try:
        parts = _parts(model, index, pipeline_class)
        for name in NAMES[: model.experts]:
            if name not in parts:
                raise InputError(f"its index has no {name}")
            config = configuration(model.name, name, model.source, model.card, index)
            kind: Any = component_class(parts[name])
            with torch.device("meta"):
                found[name] = kind.from_config(config).eval()
    except InputError as error:
        shown = f"--model {model.name}: "
        raise InputError(shown + "cannot be loaded: " + str(error).removeprefix(shown)) from error
    except Exception as error:  # what a class makes of a damaged configuration can be anything
        raise InputError(f"--model {model.name}: cannot be loaded: {name}/config.json: {one_line(error)}") from error
    return found


def _parts(model: Model, index: dict[str, Any], pipeline_class: type) -> dict[str, Part]:
    """The components that would be loaded, by name; the classes of all of them are there."""
    replaced = {part.name: part for part in model.card.parts}
    if model.kind.modular:
        return {**listed_modular_parts(index, model.source), **replaced}
    listed = {part.name: part for part in listed_parts(index, pipeline_class, model.source, model.card.revision)}
    return {**listed, **replaced}
