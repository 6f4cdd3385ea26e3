"""The components of a saved pipeline, each loaded by itself, and whether it is whole.

diffusers and transformers load a damaged model with a warning at most: weights that are missing stay without values or
are drawn at random, those that the configuration has no place for are dropped, and a tokenizer without a vocabulary
takes every word for unknown. Each is an error here.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_diffusers.errors import InputError, with_extra
from psa_diffusers.families.card import Part

if TYPE_CHECKING:
    import torch

LIBRARIES = ("diffusers", "transformers")
LONGEST_REASON = 300


def listed_parts(
    index: Mapping[str, Any], pipeline_class: type, source: str, revision: str | None = None
) -> list[Part]:
    """The components that model_index.json lists and the pipeline takes.

    Components of other libraries than diffusers and transformers are left to the pipeline to load.

    Raises:
        InputError: an entry is malformed, or names a class or a library that is not there.
    """
    parts = []
    for name in inspect.signature(pipeline_class).parameters:
        entry = index.get(name)
        if not isinstance(entry, list) or entry == [None, None]:
            continue  # a setting of the pipeline, or a component that this model does not have
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise InputError(f"model_index.json: {name} is {entry}; it must be a library and a class")
        library, kind = entry
        if library in LIBRARIES:
            part = Part(name, library, kind, source, name, revision)
            component_class(part)
            parts.append(part)
        elif not hasattr(importlib.import_module("diffusers.pipelines"), library):
            raise InputError(f"model_index.json: {name} is of {library}; allowed are {' and '.join(LIBRARIES)}")
    return parts


def component_class(part: Part) -> type:
    """The class of a component.

    Raises:
        InputError: the library has no class of that name.
    """
    found = getattr(importlib.import_module(part.library), part.type, None)
    if not isinstance(found, type):
        installed = f"{part.library} {version(part.library)}"
        raise InputError(f"{part.name} is a {part.type}, which {installed} does not have")
    return found


def load_component(part: Part, dtype: torch.dtype) -> Any:
    """Load one component, and make sure that it is whole; networks come in `dtype` unless they keep their own.

    Raises:
        InputError: whatever keeps it from being loaded, in one line that begins with its name.
    """
    import torch

    kind = component_class(part)
    pinned = {"revision": part.revision, "variant": part.variant}
    settings: dict[str, Any] = {"subfolder": part.subfolder}
    settings |= {name: value for name, value in pinned.items() if value is not None}
    if issubclass(kind, torch.nn.Module):
        settings |= {
            "dtype" if part.library == "transformers" else "torch_dtype": dtype,
            "use_safetensors": True,
            "low_cpu_mem_usage": True,
            "output_loading_info": True,
        }
    try:
        loaded = kind.from_pretrained(part.repository, **settings)  # type: ignore[attr-defined]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files end in many kinds, among them plain Exception
        raise InputError(f"{part.name}: {with_extra(one_line(error))}") from error
    if issubclass(kind, torch.nn.Module):
        loaded, told = loaded
        _check_weights(part.name, loaded, told)
    elif hasattr(loaded, "vocab_files_names"):
        _check_vocabulary(part, loaded)
    return loaded


def one_line(error: Exception) -> str:
    """What an error says, on one line that is not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _check_weights(name: str, network: torch.nn.Module, told: Mapping[str, Iterable[Any]]) -> None:
    missing = sorted(told["missing_keys"])
    if missing:
        raise InputError(
            f"{name}: its weights lack {some(missing)}; the files are not complete, or config.json is another model's"
        )
    resized = sorted(str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in told["mismatched_keys"])
    if resized:
        raise InputError(f"{name}: {some(resized)} in its weights and in config.json differ in size")
    unused = sorted(told["unexpected_keys"])
    if not name.startswith("transformer"):
        # A text encoder may be saved with its decoder. More blocks than it has are another matter.
        places = {_numberless(key) for key in network.state_dict()}
        unused = [key for key in unused if _numberless(key) in places]
    if unused and getattr(network, "hf_quantizer", None) is None:  # quantised weights have companions
        raise InputError(f"{name}: config.json has no place for {some(unused)} of its weights; it is another model's")
    check_values(name, network)


def check_values(name: str, network: torch.nn.Module) -> None:
    """Refuse a network in which a parameter or buffer has no values.

    Raises:
        InputError: names the first such parameter or buffer.
    """
    for kind in (network.named_parameters(), network.named_buffers()):
        empty = [key for key, value in kind if value.is_meta]
        if empty:
            raise InputError(f"{name}: {some(empty)} got no values from its weights; the files are not complete")


def _check_vocabulary(part: Part, tokenizer: Any) -> None:
    """A vocabulary is one file for the fast tokenizers, and one or two others for the slow ones."""
    files = dict(tokenizer.vocab_files_names)
    whole = files.pop("tokenizer_file", "tokenizer.json")
    if not files or _is_there(part, whole) or all(_is_there(part, file) for file in files.values()):
        return
    others = " and ".join(files.values())
    raise InputError(f"{part.name}: has no vocabulary; {whole} is missing, and so is {others}")


def _is_there(part: Part, file: str) -> bool:
    """Whether a component was saved with a file, which is in the cache by now if it comes from the hub."""
    folder = Path(part.repository)
    if folder.is_dir():
        return (folder / part.subfolder / file).is_file()
    from huggingface_hub import try_to_load_from_cache

    path = f"{part.subfolder}/{file}".lstrip("/")
    return isinstance(try_to_load_from_cache(part.repository, path, revision=part.revision), str)


def _numberless(key: str) -> str:
    return re.sub(r"\d+", "*", key)


def some(keys: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
