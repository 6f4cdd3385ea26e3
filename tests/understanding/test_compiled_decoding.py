"""What is compiled is dense: steps of decoding after a sparse prefill, in one graph, and compiled prefills."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from psa_presets import Preset
from psa_testing.tiny_language_models import tiny
from psa_transformers import apply_psa

SPARSE = Preset(block={"query": 32, "key": 16}, rule="budget", density=0.3)
SMALL = {"min_tokens": 64, "dense_last": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


def test_a_compiled_prefill_is_that_of_before():
    model, given = tiny("llama")
    with torch.no_grad():
        before = model(**given).logits
        with apply_psa(model, SPARSE, **SMALL, strict=True) as psa:
            assert torch.equal(compiled(model)(**given).logits, before)
            assert psa.stats().calls == 0
