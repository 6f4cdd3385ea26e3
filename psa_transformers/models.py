"""Which parts of a model have the attention that is patched."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedModel, masking_utils

from psa_transformers.names import named

# What transformers knows by their names: it makes other masks, or packs sequences, where one of these is set.
KNOWN_BY_NAME = ("flash", "flex", "paged")
# A model that looks for some names itself.
COMPARED = re.compile(r"""_attn_implementation\s*(==|!=|in|not\s+in)\s*(\([^()]*\)|\[[^][]*\]|"[^"]*"|'[^']*')""")


def check_library() -> None:
    """Check that transformers tells functions that make masks where queries begin: attention functions cannot know it.

    Raises:
        ImportError: transformers is too old.
    """
    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(
            f"transformers {transformers.__version__}: its masks do not say where queries begin; 5.17 and 5.24 do"
        )


def decoder_of(model: Any) -> PreTrainedModel:
    """The innermost model that has the configuration of the text.

    Raises:
        TypeError: this is no model of transformers.
        ValueError: no part of it has that configuration.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model={type(model).__name__}: expected a model of transformers (PreTrainedModel), without wrappers: "
            "of PEFT's, get_base_model() is that model"
        )
    config = model.config.get_text_config(decoder=True)
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config]
    if not found or model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__}: expected a decoder of text, alone or with what it sees and hears")
    return found[-1]


def models_around(model: PreTrainedModel, decoder: PreTrainedModel) -> list[PreTrainedModel]:
    """The models that hold the decoder, from the outermost to itself."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return [part for part in parts if any(inner is decoder for inner in part.modules())]


def vision_towers(model: PreTrainedModel, decoder: PreTrainedModel) -> list[PreTrainedModel]:
    """The outermost models of images and videos beside the decoder."""
    around = models_around(model, decoder)
    configs = [getattr(part.config, "vision_config", None) for part in around]
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [part for part in parts if any(part.config is config for config in configs if config is not None)]
    inner = {id(each) for part in found for each in part.modules() if each is not part}
    return [part for part in found if id(part) not in inner]


def set_implementation(part: PreTrainedModel, name: str) -> None:
    """Let a part of a model use an attention function by its registered name.

    Raises:
        ValueError: it does not look its attention function up.
    """
    part.set_attn_implementation(name)
    if part.config._attn_implementation != name:
        raise ValueError(f"{type(part).__name__}: its attention cannot be chosen by name (AttentionInterface)")


def check_comparisons(part: PreTrainedModel, before: str, name: str) -> None:
    """Check that a part of a model computes the same by another name of its implementation.

    Attention with an indexer, for one, puts what it chose into the mask where the name is 'sdpa' or 'eager', and leaves
    it to the attention function elsewhere.

    Raises:
        ValueError: it compares the name, and would find something else; or nothing in it reads the name.
    """
    methods = list(_methods(part))
    if not methods:
        raise ValueError(f"{type(part).__name__}: it has no attention that is chosen by name (AttentionInterface)")
    for where, function in methods:
        for operator, operand in COMPARED.findall(inspect.getsource(function)):
            value = ast.literal_eval(operand)
            told = [each in value if "in" in operator else each == value for each in (before, name)]
            if told[0] != told[1]:
                raise ValueError(
                    f"{where}: computes something else where attn_implementation is not {before!r}, "
                    "and PSA has a name of its own"
                )


def _methods(part: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The methods of the modules of a part that read the name of their implementation when they run."""
    shares = getattr(part.config, "num_kv_shared_layers", 0)
    kinds = {kind: None for module in part.modules() for kind in type(module).__mro__}
    for kind in kinds:
        for name, function in () if issubclass(PreTrainedModel, kind) else vars(kind).items():
            code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
            if code is None or name == "__init__" or "_attn_implementation" not in code.co_names:
                continue
            if shares or "kv_shared" not in name:  # such methods run where layers share keys
                yield f"{kind.__name__}.{name}", function


def check_implementation(part: PreTrainedModel) -> str:
    """The name of the implementation that a part has; that of before, where a copy has the name of a patch that ended.

    Raises:
        ValueError: it is one that transformers treats by its name, or another model's patch.
    """
    name = part.config._attn_implementation or "eager"
    ours = named(name)
    if ours is not None and not ours.is_free:
        raise ValueError(
            f"attn_implementation={name!r}: another model, which shares this configuration or from which it was "
            "copied, has PSA; restore that one first, or give this one a configuration of its own"
        )
    name = name if ours is None else ours.stock.name
    if any(word in name for word in KNOWN_BY_NAME):
        raise ValueError(
            f"attn_implementation={name!r}: expected 'sdpa' or 'eager', which compute what PSA does not serve; "
            "model.set_attn_implementation('sdpa') sets one"
        )
    return name
