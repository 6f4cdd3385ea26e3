"""Kandinsky 5 where its own sparse attention is on, and the sizes of its images."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_kandinsky

from psa_diffusers import apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.families import CASES
from psa_testing.families.kandinsky5 import tiny_kandinsky5
from psa_testing.spies import spy_on_attention
from psa_testing.tiny_families import SPARSE

pytestmark = pytest.mark.usefixtures("one_thread")

NABLA = {
    "attention_type": "nabla",
    "attention_P": 0.5,
    "attention_wT": 1,
    "attention_wW": 1,
    "attention_wH": 1,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_its_own_sparse_attention_stays(monkeypatch):
    case, pipe, maps = CASES["kandinsky5"], tiny_kandinsky5(**NABLA), []
    nabla = transformer_kandinsky.nablaT_v2
    counted = lambda *args, **more: maps.append(1) or nabla(*args, **more)  # noqa: E731
    monkeypatch.setattr(transformer_kandinsky, "nablaT_v2", counted)
    inputs = {"num_inference_steps": 2, "guidance_scale": 1.0}
    with attention_backend("flex"):
        stock = case.run(pipe, **inputs)
        with apply_psa(pipe, SPARSE) as psa:
            with pytest.warns(PSAFallbackWarning, match=r"sparse attention of its own \(NABLA\)") as caught:
                assert torch.equal(case.run(pipe, **inputs), stock)
            assert len([warning for warning in caught if warning.category is PSAFallbackWarning]) == 1
            assert list(psa.stats().fallbacks.values()) == [2 * 2] and psa.stats().density_sparse is None
        assert len(maps) == 2 * (2 * 2)
        with apply_psa(pipe, SPARSE, strict=True), pytest.raises(PSAFallbackError, match="NABLA"):
            case.run(pipe, **inputs)


def test_an_image_is_a_grid_of_one_frame(monkeypatch):
    case, pipe, calls = CASES["kandinsky5-t2i"], CASES["kandinsky5-t2i"].make(), spy_on_attention(monkeypatch)
    with apply_psa(pipe, SPARSE, strict=True) as psa:
        case.run(pipe, num_inference_steps=1)
    assert psa.stats().layers == ["visual_transformer_blocks.0", "visual_transformer_blocks.1"]
    assert [q.shape[1] for (q, _, _), _, _ in calls] == 4 * [16 * 12]
