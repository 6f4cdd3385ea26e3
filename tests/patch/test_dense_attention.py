"""`dense_attention`: dense steps and layers by the operator, with every key in full, or by stock ones.

On a CPU the reference stands in for the kernel, which needs a GPU.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from psa_diffusers import apply_psa
from psa_diffusers.patch import finite_guard, full_attention
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.full_attention import FullAttention
from psa_kernels import full
from psa_testing.tiny_families import CASES, WAN, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = preset(dense_steps=1.0, dense_attention="psa")
KINDS = ["wan", "hunyuan-video", "cogvideox-5b", "ltx", "mochi", "framepack"]


@pytest.fixture
def by_reference(monkeypatch):
    """Lets the reference compute dense calls; counts them."""
    calls = []
    attention = full_attention.full_attention
    monkeypatch.setattr(FullAttention, "implementation", "reference")
    monkeypatch.setattr(full_attention, "full_attention", lambda *x: calls.append(x[0].shape) or attention(*x))
    return calls


@pytest.mark.parametrize("name", [name for name in KINDS if name in CASES])
def test_dense_steps_are_equal_to_rounding(name, by_reference):
    case, pipe = CASES[name], CASES[name].make()
    stock = case.run(pipe)
    with apply_psa(pipe, DENSE, strict=True) as psa:
        assert_equal_to_rounding(case.run(pipe), stock)
        stats = psa.stats()
    assert stats.density_run == 1 and stats.density_sparse is None and stats.implementation is None
    assert stats.dense_at == list(range(stats.steps)) and stats.fallbacks == {}
    assert stats.dense_implementation == "reference"
    assert len(by_reference) >= stats.steps * len(stats.layers)
    assert torch.equal(case.run(pipe), stock)


def test_text_of_other_lengths_in_one_batch(by_reference):
    case, pipe = CASES["hunyuan-video"], CASES["hunyuan-video"].make()
    prompts = {"prompt": ["a cat", "a longer prompt, about a dog"]}
    stock = case.run(pipe, **prompts)
    with apply_psa(pipe, DENSE, strict=True):
        assert_equal_to_rounding(case.run(pipe, **prompts), stock)
    assert len({tokens for batch, tokens, *_ in by_reference if batch == 1}) == 2


def test_dense_layers_beside_sparse_ones(by_reference):
    pipe = WAN.make()
    rules = {"layers": [{"match": 1, "dense": True}], "steps": [{"match": 3, "dense": True}], "dense_steps": 1}
    with apply_psa(pipe, preset(**rules), strict=True) as psa:
        expected, stats = WAN.run(pipe), psa.stats()
    with apply_psa(pipe, preset(**rules, dense_attention="psa"), strict=True) as psa:
        assert_equal_to_rounding(WAN.run(pipe), expected)
        found = psa.stats()
    assert found.density == stats.density and found.dense_at == stats.dense_at == [0, 3]
    assert (found.dense_implementation, stats.dense_implementation) == ("reference", None)
    layers, sparse_steps, forwards = len(stats.layers), 2, len(by_reference) / (2 * len(stats.layers) + 2)
    assert len(by_reference) == forwards * (2 * layers + sparse_steps) and forwards in (1, 2)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video"])
def test_compiled_blocks(name, by_reference):
    case, pipe = CASES[name], CASES[name].make()
    with apply_psa(pipe, preset(dense_steps=0.5, dense_attention="psa"), strict=True) as psa:
        eager, stats, calls = case.run(pipe), psa.stats(), len(by_reference)
        torch._dynamo.reset()
        for block in getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")
        assert_equal_to_rounding(case.run(pipe), eager)
        assert psa.stats() == stats and stats.dense_implementation == "reference"
    assert len(by_reference) == 2 * calls
    torch._dynamo.reset()


def test_lists_are_made_once_a_run(by_reference, monkeypatch):
    made, full_lists = [], full.full_lists
    monkeypatch.setattr(full, "full_lists", lambda *x: made.append(x) or full_lists(*x))
    pipe = WAN.make()
    with apply_psa(pipe, DENSE, strict=True):
        WAN.run(pipe)
        assert len(made) == 1
        WAN.run(pipe)
        assert len(made) == 2 and len(by_reference) > 2


def test_where_there_is_no_such_kernel_stock_attention_is_bit_identical_and_one_warning_says_why():
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, DENSE) as psa:
        with pytest.warns(PSAFallbackWarning, match="dense_attention: psa has no effect") as caught:
            assert torch.equal(WAN.run(pipe), stock)
            WAN.run(pipe)
        assert len([entry for entry in caught if entry.category is PSAFallbackWarning]) == 1
        stats = psa.stats()
    assert stats.dense_implementation is None and stats.fallbacks == {} and stats.density_run == 1
    with apply_psa(pipe, DENSE, strict=True), pytest.raises(PSAFallbackError, match=r"strict: dense_attention: psa"):
        WAN.run(pipe)


def test_a_call_that_does_not_pay_is_stock_without_a_word(by_reference, monkeypatch):
    asked = []
    monkeypatch.setattr(full_attention, "serves_full", lambda *x: asked.append(x[0].shape) or (False, None))
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, DENSE, strict=True) as psa, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(WAN.run(pipe), stock)
        # Once for the device and once a layer and shape: then the projections are spared.
        assert len(asked) == 1 + len(psa.stats().layers)
    assert by_reference == [] and psa.stats().dense_implementation is None


def test_fallbacks_of_sparse_layers_stay_stock(by_reference):
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, preset(dense_steps=0, min_tokens=1000, dense_attention="psa")) as psa:
        with pytest.warns(PSAFallbackWarning, match="min_tokens"):
            assert torch.equal(WAN.run(pipe), stock)
        assert psa.stats().fallbacks
    assert by_reference == []


def test_what_is_not_finite_is_computed_again(by_reference, monkeypatch):
    attend = FullAttention.attend

    def spoiled(self, *arguments):
        head, tail = attend(self, *arguments)
        head[:, 0, 0, 0] = float("nan")
        return head, tail

    monkeypatch.setattr(FullAttention, "attend", spoiled)
    pipe = WAN.make()
    stock = WAN.run(pipe)
    with apply_psa(pipe, DENSE) as psa:
        with pytest.warns(PSAFallbackWarning, match=r"blocks.0 at step 1 of 4: its dense output by PSA's kernel held"):
            assert_equal_to_rounding(WAN.run(pipe), stock)
        stats = psa.stats()
    assert stats.not_finite == {layer: [0, 1, 2, 3] for layer in stats.layers} and stats.model_not_finite is None
    assert set(stats.fallbacks) == {finite_guard.FULL_COMPUTED_AGAIN} and stats.dense_implementation is None
    with apply_psa(pipe, DENSE, strict=True), pytest.raises(PSAFallbackError, match="held values that are not finite"):
        WAN.run(pipe)


def test_the_backend_of_diffusers_reaches_dense_steps(monkeypatch):
    """As FlashAttention 3 is chosen; `stock` hands it on to the processors that compute the dense phase."""
    # diffusers sets it for all models of the process.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    pipe = WAN.make()
    with apply_psa(pipe, preset(dense_steps=1.0, dense_attention="stock"), strict=True) as psa:
        pipe.transformer.set_attention_backend("_native_math")
        seen = []
        original = type(psa.processor._sites[pipe.transformer.blocks[0].attn1].original)
        call = original.__call__
        monkeypatch.setattr(
            original, "__call__", lambda self, *x, **y: seen.append(self._attention_backend) or call(self, *x, **y)
        )
        WAN.run(pipe)
    assert seen and set(seen) == {AttentionBackendName._NATIVE_MATH}


@pytest.mark.parametrize("set_before", [True, False])
def test_the_backend_of_diffusers_is_reset_for_all(set_before, monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    pipe = WAN.make()
    transformer = pipe.transformer
    if set_before:
        transformer.set_attention_backend("_native_math")
    with apply_psa(pipe, preset(), strict=True) as psa:
        if not set_before:
            transformer.set_attention_backend("_native_math")
        WAN.run(pipe)
        originals = [site.original for site in psa.processor._sites.values()]
        assert {each._attention_backend for each in originals} == {AttentionBackendName._NATIVE_MATH}
        transformer.reset_attention_backend()
        WAN.run(pipe)
        assert {each._attention_backend for each in originals} == {None}
    assert {each._attention_backend for each in transformer.attn_processors.values()} == {None}
