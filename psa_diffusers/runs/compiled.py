"""Transformers whose blocks torch.compile compiles."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any


def missing_compiler(device: str) -> str | None:
    """The C++ compiler that torch.compile would call on a device and that is not there; None if nothing is missing."""
    if device != "cpu" or sys.platform == "win32":
        return None
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else compiler


def compile_transformers(pipe: Any) -> None:
    """Compile the blocks of all transformers of a pipeline; nothing is compiled before the first call.

    Graphs may break, as stock attention of some models cannot be traced.
    """
    from psa_diffusers.patch.modules import find_transformers

    for transformer in find_transformers(pipe).values():
        compile_blocks(transformer)


def compile_blocks(transformer: Any, **settings: Any) -> None:
    """diffusers' regional compilation, one graph for blocks that are alike, also of models that lack it.

    Args:
        settings: those of torch.compile.
    """
    from psa_diffusers.families import find_family

    try:
        transformer.compile_repeated_blocks(**settings)
    except ValueError:  # its class does not say which blocks are alike
        for block in find_family(transformer).self_attentions(transformer):
            transformer.get_submodule(block).compile(**settings)
