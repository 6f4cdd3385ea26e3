"""Modular pipelines of diffusers: what their index lists, put together without any code of a repository's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_diffusers.checkpoints.components import LIBRARIES, component_class
from psa_diffusers.diffusers_internals import inner_blocks
from psa_diffusers.errors import InputError
from psa_diffusers.families.card import Part

if TYPE_CHECKING:
    import torch

MODULAR_INDEX = "modular_model_index.json"
OFFLOADS = {"offload_type": "leaf_level", "use_stream": True}


def listed_modular_parts(index: Mapping[str, Any], source: str) -> dict[str, Part]:
    """The components that a modular_model_index.json lists, by name; classes are not looked at.

    A component that the folder `source` holds is taken from there, whatever the index says: a copy keeps the index of
    its original.

    Raises:
        InputError: an entry is malformed.
    """
    parts = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], dict)):
            continue  # a setting
        library, kind, loading = entry
        if library is None:  # it was not loaded when the index was written
            library, kind = loading.get("type_hint") or (None, None)
        repository = loading.get("pretrained_model_name_or_path") or loading.get("repo")
        subfolder = loading.get("subfolder") or ""
        revision, variant = loading.get("revision"), loading.get("variant")
        if subfolder and Path(source, subfolder).is_dir():
            repository, revision = source, None
        if repository is None:
            continue  # left to whoever runs it
        if not all(isinstance(word, str) for word in (library, kind, repository, subfolder)):
            raise InputError(f"{MODULAR_INDEX}: {name} is {entry}; it must be a library, a class and where it is")
        parts[name] = Part(name, library, kind, repository, subfolder, revision, variant)
    return parts


def assemble_modular(
    pipeline_class: type,
    index: Mapping[str, Any],
    source: str,
    workflows: tuple[str, ...],
    replaced: Mapping[str, Part],
    load: Callable[[Part], Any],
) -> Any:
    """A modular pipeline with the components of some of its workflows, all of them if none is named.

    Args:
        index: its modular_model_index.json, which is in `source`.
        replaced: components to take from elsewhere.
        load: gives a component.

    Raises:
        InputError: the index lacks a component, or lists one that cannot be loaded.
    """
    listed = {**listed_modular_parts(index, source), **replaced}
    settings = {name: value for name, value in index.items() if name not in listed and not isinstance(value, list)}
    # Blocks of diffusers alone: a name that it lacks stands for code in the repository.
    settings["_blocks_class_name"] = _blocks_name(pipeline_class, index)
    pipe = pipeline_class(modular_config_dict=settings)
    parts = []
    for spec in _wanted(pipe, workflows):
        part = listed.get(spec.name)
        if part is not None:
            if part.library not in LIBRARIES:
                raise InputError(
                    f"{MODULAR_INDEX}: {part.name} is of {part.library}; allowed are {' and '.join(LIBRARIES)}"
                )
            component_class(part)
            parts.append(part)
        elif spec.default_creation_method == "from_pretrained":
            raise InputError(f"{MODULAR_INDEX} has no {spec.name}")
    for part in parts:
        pipe.update_components(**{part.name: load(part)})
    return pipe


def place_modular(pipe: Any, device: str, offload: str) -> None:
    """Put a modular pipeline where it is to run; `offload` as for `load_pipeline`."""
    import torch

    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    if offload == "model":
        from diffusers import ComponentsManager

        manager = ComponentsManager()
        for name, network in networks.items():
            manager.add(name, network)
        # One at a time, as with other pipelines. Left to itself it keeps what fits, activations apart.
        manager.enable_auto_cpu_offload(device=device, offload_strategy=lambda hooks, **about: hooks)
    elif offload == "group":
        for network in networks.values():
            _offload_layers(network, torch.device(device))
    else:
        pipe.to(device)


def set_progress_bars(pipe: Any, **settings: Any) -> None:
    """As `set_progress_bar_config`, for loops at any depth: a modular pipeline's own reaches the uppermost alone."""
    for block in inner_blocks(pipe):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(**settings)


def _offload_layers(network: torch.nn.Module, device: torch.device) -> None:
    from diffusers.hooks import apply_group_offloading

    own: Any = getattr(network, "enable_group_offload", None)
    if own is not None:
        own(onload_device=device, **OFFLOADS)
    else:
        apply_group_offloading(network, onload_device=device, **OFFLOADS)


def _blocks_name(pipeline_class: Any, index: Mapping[str, Any]) -> str:
    import diffusers

    name: Any = index.get("_blocks_class_name")
    known = getattr(diffusers, name, None) if isinstance(name, str) else None
    blocks = diffusers.ModularPipelineBlocks
    return name if isinstance(known, type) and issubclass(known, blocks) else pipeline_class.default_blocks_name


def _wanted(pipe: Any, workflows: tuple[str, ...]) -> list[Any]:
    """What diffusers tells of each component that is needed."""
    if not workflows:
        return pipe.blocks.expected_components
    found: dict[str, Any] = {}
    for workflow in workflows:
        found |= {spec.name: spec for spec in pipe.blocks.get_workflow(workflow).expected_components}
    return list(found.values())
