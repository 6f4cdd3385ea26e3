"""What is compiled is dense: steps of decoding after a sparse prefill, in one graph, and prefills, which say so."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

from psa_testing.tiny_language_models import FULL, SMALL, SPARSE, tiny
from psa_transformers import apply_psa
from psa_transformers.compiled import COMPILED

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def compiled(model):
    """As `generate` compiles a model whose cache is static: hooks are traced too."""
    return torch.compile(model.__call__, backend="eager", fullgraph=True)


def test_decoding_after_a_sparse_prefill():
    model, given = tiny("llava_next_video")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    with torch.no_grad(), apply_psa(model, SPARSE, **SMALL) as psa:
        model(**given, past_key_values=cache)
        before = psa.stats()
        token = torch.tensor([[7]])
        eager = model(input_ids=token, past_key_values=cache).logits
        for layer in cache.layers:  # the step is taken back
            layer.cumulative_length.sub_(1)
        assert torch.allclose(compiled(model)(input_ids=token, past_key_values=cache).logits, eager, atol=1e-6)
        assert before.sparse_calls == 2 and psa.stats() == before


def test_generate_compiles_decoding_alone():
    """On a GPU it compiles all forwards on a static cache but the prefill that is not in chunks; here it is told to."""
    model, given = tiny("Llama", num_hidden_layers=1)
    lengths = []

    def backend(graph, inputs, **_options):
        lengths.append(next(x.shape[1] for x in inputs if x.dtype == torch.long and x.dim() == 2))  # input_ids
        return graph.forward

    config = CompileConfig(backend=backend, dynamic=False)
    config._compile_all_devices = True
    options = {"do_sample": False, "cache_implementation": "static", "prefill_chunk_size": 87}
    before = model.generate(**given, **options, max_new_tokens=4)
    options["compile_config"] = config
    with apply_psa(model, FULL, **SMALL, strict=True) as psa:
        found = model.generate(**given, **options, max_new_tokens=4)
        stats = psa.stats()
    assert torch.equal(found, before) and lengths == [1]
    assert stats.prefills == stats.sparse_calls == stats.calls == 2
    assert "get_compiled_call" not in vars(model)
    for text in ({"min_tokens": 100, "dense_last": 4}, {"min_tokens": 64, "dense_last": 87}):  # runs as before
        lengths.clear()
        with apply_psa(model, FULL, **text) as psa:
            model.generate(**given, **options, max_new_tokens=1)
            assert set(lengths) == {87} and psa.stats().prefills == (text["dense_last"] < 87)


def test_another_way_to_compile_is_kept():
    model, _ = tiny("llama")
    model.get_compiled_call = first = lambda _config: model
    psa = apply_psa(model, FULL, **SMALL)
    assert model.get_compiled_call is not first
    psa.restore()
    assert model.get_compiled_call is first
    psa = apply_psa(model, FULL, **SMALL)
    model.get_compiled_call = later = lambda _config: model
    psa.restore()
    assert model.get_compiled_call is later


def test_a_compiled_prefill_is_that_of_before():
    model, given = tiny("Llama", num_hidden_layers=1)
    with torch.no_grad():
        before = model(**given).logits
        with apply_psa(model, SPARSE, **SMALL) as psa:
            run = compiled(model)
            with pytest.warns(UserWarning, match="a compiled forward of many tokens"):
                assert torch.equal(run(**given).logits, before)
            assert torch.equal(run(**given).logits, before)
            assert psa.stats().calls == 0 and psa.stats().fallbacks == {COMPILED: 1}
        with apply_psa(model, SPARSE, **SMALL, strict=True):
            with pytest.raises(RuntimeError, match=r"strict: .* a compiled forward"):
                compiled(model)(**given)
            short = {"input_ids": given["input_ids"][:, :60]}
            assert compiled(model)(**short).logits.isfinite().all()


@pytest.mark.parametrize(("implementation", "static"), [("sdpa", True), ("sdpa", False), ("eager", False)])
def test_a_compiled_layer_gets_the_mask_of_before(implementation, static):
    """Outside of it the model is not compiled: what it makes for a mask is a marker."""
    model, given = tiny("Llama", num_hidden_layers=1)
    model.set_attn_implementation(implementation)
    ids = given["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def two_chunks(between=lambda: None):
        cache = StaticCache(config=model.config, max_cache_len=256) if static else DynamicCache()
        with torch.no_grad():
            model(ids[:, :90], attention_mask=mask[:, :90], past_key_values=cache)
            between()
            return model(ids[:, 90:], attention_mask=mask, past_key_values=cache).logits

    before = two_chunks()
    with apply_psa(model, FULL, **SMALL) as psa:
        with pytest.warns(UserWarning, match="a compiled forward of many tokens"):
            found = two_chunks(lambda: model.model.layers[0].compile(backend="eager", fullgraph=True))
        assert torch.allclose(found, before, atol=1e-5)
        assert psa.stats().sparse_calls == 1 and psa.stats().fallbacks == {COMPILED: 1}
