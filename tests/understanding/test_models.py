"""Which models are taken, and the line for each that is not."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2Model,
    MambaConfig,
    MambaModel,
    masking_utils,
)

from psa_testing.tiny_language_models import SPARSE, forward, registered, tiny
from psa_transformers import apply_psa

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_indexer_that_looks_for_names():
    """What it chose is in the mask by these names alone: every forward would be another one, long or short."""
    pytest.importorskip("transformers.models.deepseek_v32", reason="transformers is too old")
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    indexer = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "num_key_value_heads": 4}
    model, given = tiny("DeepseekV32", **ranks, **indexer, first_k_dense_replace=2)
    names, before = registered(), forward(model, given)
    with pytest.raises(ValueError, match=r"^DeepseekV32Attention.forward: computes something else where .* not 'sdpa'"):
        apply_psa(model, SPARSE)
    assert registered() == names and torch.equal(forward(model, given), before)


def test_eager_attention_that_looks_for_its_name():
    size = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2Model(GPT2Config(**size, attn_implementation="eager"))
    with pytest.raises(ValueError, match=r"^GPT2Attention.forward: computes something else where .* not 'eager'"):
        apply_psa(model, SPARSE)
    apply_psa(GPT2Model(GPT2Config(**size)), SPARSE).restore()


def test_a_model_without_attention():
    """Its cache has no length that a hook could ask for."""
    model = MambaModel(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"^MambaModel: it has no attention that is chosen by name"):
        apply_psa(model, SPARSE)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="model=Linear: expected a model of transformers"):
        apply_psa(torch.nn.Linear(2, 2))


def test_a_transformers_that_is_too_old(monkeypatch):
    model, _ = tiny("llama")
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match="its masks do not say where queries begin"):
        apply_psa(model, SPARSE)


def test_an_implementation_that_goes_by_its_name():
    model, _ = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2': expected 'sdpa' or 'eager'"):
        apply_psa(model, SPARSE)
