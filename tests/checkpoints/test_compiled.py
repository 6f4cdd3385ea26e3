"""Blocks that torch.compile compiles: those of all transformers of a pipeline, and nothing else."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers.checkpoints.compiled import compile_blocks
from psa_testing.families import CASES

NAMES = ("wan-two-experts", "cogvideox-5b", "mochi", "minimax-h3")


@pytest.mark.parametrize("name", [name for name in NAMES if name in CASES])
def test_all_blocks_and_nothing_else(name):
    pipe = CASES[name].make()
    compile_blocks(pipe)
    compiled = {
        (part, name.rpartition(".")[0])
        for part, component in pipe.components.items()
        if isinstance(component, torch.nn.Module)
        for name, module in component.named_modules()
        if module._compiled_call_impl is not None
    }
    wanted = {"wan-two-experts": {("transformer", "blocks"), ("transformer_2", "blocks")}}
    assert compiled >= wanted.get(name, {("transformer", "transformer_blocks")})
    assert {part for part, _ in compiled} <= {"transformer", "transformer_2", "transformer_ref"}
