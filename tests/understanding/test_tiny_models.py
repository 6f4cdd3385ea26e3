"""Each family on a tiny random model: equal to stock attention where everything is kept, and undone without a trace."""

from __future__ import annotations

import pytest
import torch

from psa_testing.tiny_language_models import FAMILIES, FULL, SMALL, SPARSE, tiny
from psa_transformers import apply_psa

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model, given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def answer(model, given, tokens=4, **options) -> list[list[int]]:
    out = model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
    return out[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    try:
        model, given = tiny(family)
    except ImportError as error:
        pytest.skip(f"transformers is too old: {error}")
    before, said = logits(model, given), answer(model, given)
    names = [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]
    with apply_psa(model, FULL, **SMALL) as psa:
        assert torch.allclose(logits(model, given), before, rtol=1e-4, atol=1e-4)
        assert answer(model, given) == said
        stats = psa.stats()
    layers = 1 if family == "qwen3_5" else 2
    assert (stats.prefills, stats.calls, stats.sparse_calls) == (2, 2 * layers, 2 * layers)
    assert stats.density == pytest.approx(1) and not stats.fallbacks and stats.implementation == "reference"
    with apply_psa(model, SPARSE, **SMALL) as psa:
        sparse = logits(model, given)
        assert torch.equal(sparse, logits(model, given))
        stats = psa.stats()
    assert sparse.isfinite().all() and not torch.allclose(sparse, before, rtol=1e-3, atol=1e-3)
    assert 0.25 < stats.density < 0.95 and len(stats.layers) == layers
    assert torch.equal(logits(model, given), before)
    assert names == [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]
