"""Names under which patches are registered: compiled graphs go on with the next patch, and copies have them too."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import CompileConfig

from psa_testing.tiny_language_models import FULL, SMALL, SPARSE, forward, tiny
from psa_transformers import PSAFallbackWarning, apply_psa
from psa_transformers.compiled import COMPILED

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def test_decoding_is_compiled_once_for_all_patches():
    """A server patches around each request, and dynamo gives up after eight graphs of one function."""
    graphs = []

    def backend(graph, _inputs, **_options):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend)
    config._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "max_new_tokens": 3}
    pairs = [tiny("Llama", num_hidden_layers=1), tiny("Llama", num_hidden_layers=1)]
    dense = [model.generate(**given, **options) for model, given in pairs]
    counts = []
    for _ in range(3):
        for (model, given), expected in zip(pairs, dense, strict=True):
            with apply_psa(model, FULL, **SMALL) as psa:
                assert torch.equal(model.generate(**given, **options, compile_config=config), expected)
                assert psa.stats().sparse_calls == 1
            counts.append(len(graphs))
    assert counts[0] == 1 and counts[-1] == counts[1]


def test_each_patch_tells_of_its_compiled_forwards():
    """The graph of the last patch would be silent, and with `strict` it would run."""
    model, given = tiny("Llama", num_hidden_layers=1)
    run = torch.compile(model.__call__, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="compiled forward"):
                run(**given)
                run(**given)
                assert psa.stats().fallbacks == {COMPILED: 1}
        with apply_psa(model, SPARSE, **SMALL, strict=True), pytest.raises(RuntimeError, match="compiled forward"):
            run(**given)


def test_models_that_are_patched_at_once_have_names_of_their_own():
    (one, given), (other, _) = tiny("llama"), tiny("qwen3")
    name = lambda model: model.config._attn_implementation  # noqa: E731
    with apply_psa(one, SPARSE):
        first = name(one)
    with apply_psa(other, SPARSE):
        assert name(other) == first
        with apply_psa(one, FULL, **SMALL) as psa:
            second = name(one)
            forward(one, given)
            assert psa.stats().density == 1
    with apply_psa(other, SPARSE), apply_psa(one, SPARSE):
        assert (name(other), name(one)) == (first, second) and first != second
    with apply_psa(one, SPARSE):  # the one that its graphs check, though another is free
        assert name(one) == second


def test_a_name_is_free_when_its_model_is_gone():
    model, _ = tiny("llama")
    apply_psa(model, SPARSE)
    name = model.config._attn_implementation
    del model
    gc.collect()
    other, _ = tiny("llama")
    with apply_psa(other, SPARSE):
        assert other.config._attn_implementation == name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_copy_of_a_patched_configuration_outlives_the_patch(implementation):
    model, given = tiny("llama")
    model.set_attn_implementation(implementation)
    with apply_psa(model, SPARSE, **SMALL):
        made = type(model)(copy.deepcopy(model.config)).eval()
        made.load_state_dict(model.state_dict())
    before = forward(model, given)
    assert torch.equal(forward(made, given), before)
    with apply_psa(made, SPARSE, **SMALL) as psa:
        forward(made, given)
        assert psa.stats().sparse_calls == 2
    assert made.config._attn_implementation == implementation and torch.equal(forward(made, given), before)
