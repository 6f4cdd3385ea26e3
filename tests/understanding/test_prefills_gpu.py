"""Prefills on a GPU in bfloat16, by the kernels."""

from __future__ import annotations

import pytest
import torch

from psa_presets import Preset
from psa_testing.tiny_language_models import tiny, words
from psa_transformers import apply_psa

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FULL = Preset(levels=[1], thresholds=[1.0])
TOKENS = 3000
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def model():
    return tiny("Llama", **WIDE)[0].to("cuda", torch.bfloat16)


def prompts(*lengths: int):
    """Prompts with padding on the left."""
    longest = max(lengths)
    rows = [[0] * (longest - length) + words(length, length) for length in lengths]
    mask = [[0] * (longest - length) + [1] * length for length in lengths]
    return {"input_ids": torch.tensor(rows, device="cuda"), "attention_mask": torch.tensor(mask, device="cuda")}


def forward(model, given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits[given["attention_mask"].bool()].float()


def by_kernel(psa):
    """The figures of a patch, all of whose calls a kernel computed."""
    stats = psa.stats()
    assert not stats.fallbacks and stats.implementation not in (None, "reference")
    return stats


@pytest.mark.parametrize("lengths", [(TOKENS,), (TOKENS, TOKENS - 777)])
def test_with_everything_kept_it_is_dense_attention(model, lengths):
    given = prompts(*lengths)
    before = forward(model, given)
    with apply_psa(model, FULL, min_tokens=1024, dense_last=100) as psa:
        found = forward(model, given)
        assert by_kernel(psa).sparse_calls == 2
    assert (found - before).norm() < 2e-2 * before.norm()
    assert torch.equal(forward(model, given), before)


def test_sparse_prefills_are_finite_and_repeatable(model):
    given = prompts(TOKENS, TOKENS - 777)
    with apply_psa(model, density=0.25, min_tokens=1024) as psa:
        found = forward(model, given)
        assert torch.equal(forward(model, given), found)
        assert 0.25 < by_kernel(psa).density < 0.6
    assert found.isfinite().all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_in_chunks_and_decode(model, cache):
    """With a static cache `generate` compiles its steps of decoding."""
    given = prompts(TOKENS)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    with apply_psa(model, density=0.25, min_tokens=1024) as psa:
        found = model.generate(
            **given, **options, prefill_chunk_size=1000, output_logits=True, return_dict_in_generate=True
        )
        assert by_kernel(psa).prefills == 2
    assert torch.stack(found.logits).isfinite().all()


def test_float32_is_left_to_stock():
    model = tiny("Llama", **WIDE)[0].to("cuda")
    given = prompts(TOKENS)
    before = forward(model, given)
    with apply_psa(model, FULL, min_tokens=1024), pytest.warns(UserWarning, match="float32 on a GPU"):
        assert torch.equal(forward(model, given), before)
