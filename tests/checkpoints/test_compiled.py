"""Blocks that torch.compile compiles: those of all transformers of a pipeline, and nothing outside of them."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from psa_diffusers.checkpoints.compiled import compile_blocks
from psa_diffusers.families import find_family
from psa_diffusers.patch.modules import TRANSFORMERS, find_transformers
from psa_testing.families import CASES, ONE_EACH
from psa_testing.tiny_pipelines import tiny_wan

MAKERS = {name: CASES[name].make for name in ONE_EACH} | {"two experts": partial(tiny_wan, two_stage=True)}


@pytest.mark.parametrize("name", MAKERS)
def test_all_blocks_and_nothing_outside_of_transformers(name):
    pipe = MAKERS[name]()
    compile_blocks(pipe)
    for transformer in find_transformers(pipe).values():
        blocks = find_family(transformer).self_attentions(transformer)
        assert all(transformer.get_submodule(block)._compiled_call_impl is not None for block in blocks)
    others = [part for name, part in pipe.components.items() if name not in TRANSFORMERS]
    inside = [module for part in others if isinstance(part, torch.nn.Module) for module in part.modules()]
    assert all(module._compiled_call_impl is None for module in inside)
