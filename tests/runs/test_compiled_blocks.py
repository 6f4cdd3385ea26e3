"""Blocks that torch.compile compiles: those of all transformers of a pipeline, which compute what they did before."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.families import find_family
from psa_diffusers.patch.modules import TRANSFORMERS, find_transformers
from psa_diffusers.runs.compiled import compile_transformers
from psa_testing.expectations import assert_equal_to_rounding, preset
from psa_testing.families import CASES, ONE_EACH
from psa_testing.tiny_pipelines import tiny_wan

MAKERS = {name: CASES[name].make for name in ONE_EACH} | {"two experts": partial(tiny_wan, two_stage=True)}


@pytest.mark.parametrize("name", MAKERS)
def test_all_blocks_and_nothing_outside_of_transformers(name):
    pipe = MAKERS[name]()
    compile_transformers(pipe)
    for transformer in find_transformers(pipe).values():
        blocks = find_family(transformer).self_attentions(transformer)
        assert all(transformer.get_submodule(block)._compiled_call_impl is not None for block in blocks)
    others = [part for name, part in pipe.components.items() if name not in TRANSFORMERS]
    inside = [module for part in others if isinstance(part, torch.nn.Module) for module in part.modules()]
    assert all(module._compiled_call_impl is None for module in inside)


@pytest.mark.parametrize("name", [name for name in ("cogvideox-5b", "cosmos", "framepack", "mochi") if name in CASES])
def test_models_that_name_no_blocks_compute_what_they_did(name, monkeypatch):
    """Stock, of which not all can be one graph, and patched afterwards."""
    case = CASES[name]
    pipe, two = case.make(), {"num_inference_steps": 2}
    chosen = preset(dense_steps=0.5)

    def runs():
        with apply_psa(pipe, chosen, strict=True) as psa:
            sparse = case.run(pipe, **two)
        return case.run(pipe, **two), sparse, psa.stats()

    stock, sparse, stats = runs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    compile_transformers(pipe)
    found_stock, found_sparse, found_stats = runs()
    assert_equal_to_rounding(found_stock, stock)
    assert_equal_to_rounding(found_sparse, sparse)
    assert found_stats == stats
