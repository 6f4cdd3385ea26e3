"""A pipeline whose transformers' blocks torch.compile compiles."""

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


def compile_blocks(pipe: Any) -> None:
    """Compile the blocks of all transformers of a pipeline, one graph for blocks that are alike.

    Nothing is compiled before the first call. Graphs may break, as stock attention of some models cannot be traced.
    """
    import torch

    from psa_diffusers.families import find_family

    for name, component in pipe.components.items():
        if not name.startswith("transformer") or not isinstance(component, torch.nn.Module):
            continue
        network: Any = component
        try:
            network.compile_repeated_blocks()
        except ValueError:  # its class does not say which blocks are alike
            for block in find_family(network).self_attentions(network):
                network.get_submodule(block).compile()
