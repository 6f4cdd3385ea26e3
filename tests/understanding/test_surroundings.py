"""What may be around a forward: autocast, gradient checkpointing, threads, adapters, copies, shared configurations."""

from __future__ import annotations

import pytest
import torch

from psa_kernels import psa_attention
from psa_presets import Preset
from psa_testing.tiny_language_models import tiny
from psa_transformers import apply_psa

FULL = Preset(block={"query": 32, "key": 16}, levels=[1], thresholds=[1.0])
SPARSE = Preset(block={"query": 32, "key": 16}, rule="budget", density=0.3)
SMALL = {"min_tokens": 64, "dense_last": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def forward(model, given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("family", ["llama", "llava_next_video"])
def test_autocast(family):
    """Queries and keys come in float32 from their rotation, values in bfloat16."""
    model, given = tiny(family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = forward(model, given)
        with apply_psa(model, FULL, vision=True, **SMALL) as psa:
            found = forward(model, given)
            stats = psa.stats()
    assert found.dtype == before.dtype and stats.sparse_calls == 2 and not stats.fallbacks
    assert (found - before).abs().max() < 0.05 * before.abs().max()


def test_autocast_is_off_inside_of_the_operator(monkeypatch):
    model, given = tiny("llama")
    seen = []

    def spy(q, k, v, *rest, **more):
        seen.append(({q.dtype, k.dtype, v.dtype}, torch.is_autocast_enabled("cpu")))
        return psa_attention(q, k, v, *rest, **more)

    monkeypatch.setattr("psa_transformers.patch.psa_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16), apply_psa(model, SPARSE, **SMALL):
        forward(model, given)
    assert seen == [({torch.bfloat16}, False)] * 2
