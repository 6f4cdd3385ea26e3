"""Sparse attention that is not finite: computed again, dense, with the layer and the step named."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers import apply_psa
from psa_diffusers.patch import finite_guard
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.group_offload import offload_groups
from psa_testing.spies import count_selections, spoil_sparse
from psa_testing.tiny_families import CASES, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(tiny_wan, {**GUIDED, **SMALL_TEXT})
LAYER, STEP = "blocks.2", 2
SAID = r"blocks.2 at step 3 of 4: its sparse output held values that are not finite"


@pytest.fixture
def spoil(monkeypatch):
    """Makes the sparse output of some layers not finite at some steps; counts the sparse attentions."""
    return partial(spoil_sparse, monkeypatch, layers=(LAYER,), steps=(STEP,))


def layer_dense_at(step):
    """What the spoiled run should equal: the same preset, but the layer dense at that step."""
    sparse = TokenAttention.sparse

    def patched(self, layer, at, qkv, call, exchange=None):
        parts, stats = sparse(self, layer, at, qkv, call, exchange)
        return (self.dense(qkv, call), stats) if (layer.name, at.step) == (LAYER, step) else (parts, stats)

    return patched


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("changes", [{}, {"refresh": 2, "share_guidance": True}], ids=["lists-once", "lists-kept"])
def test_the_layer_is_dense_at_that_step_and_nothing_else_changes(value, changes, spoil, monkeypatch):
    pipe = WAN.make()
    with monkeypatch.context() as patch:
        patch.setattr(TokenAttention, "sparse", layer_dense_at(STEP))
        with apply_psa(pipe, preset(**changes)):
            expected = WAN.run(pipe)
    spoil(value)
    with apply_psa(pipe, preset(**changes)) as psa, pytest.warns(PSAFallbackWarning, match=SAID) as caught:
        result = WAN.run(pipe)
    assert result.isfinite().all()
    if not changes:  # lists that are kept are made anew at the step
        assert torch.equal(result, expected)
    assert len([entry for entry in caught if entry.category is PSAFallbackWarning]) == 1
    stats = psa.stats()
    assert stats.not_finite == {LAYER: [STEP]} and stats.model_not_finite is None
    assert stats.fallbacks == {finite_guard.COMPUTED_AGAIN: 2}  # both guidance branches
    dense = [(i, layer) for i, row in enumerate(stats.density) for layer, x in enumerate(row) if x == 1]
    assert dense == [*((0, layer) for layer in range(4)), (2, 2)]


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox-5b", "ltx", "mochi"])
def test_other_families(name, spoil):
    case, pipe = CASES[name], CASES[name].make()
    layers = []
    with apply_psa(pipe, preset()) as psa:
        layers = psa.stats().layers
    spoil(layers=layers, steps=(2,))
    with apply_psa(pipe, preset()) as psa, pytest.warns(PSAFallbackWarning, match="not finite"):
        assert case.run(pipe).isfinite().all()
    assert psa.stats().not_finite == {layer: [2] for layer in layers}
    assert psa.stats().density[2] == [1.0] * len(layers)


def test_one_forward_more_and_closer_looks_only_from_there_on(spoil, monkeypatch):
    pipe = WAN.make()
    calls = spoil()
    looked = []
    all_finite = finite_guard.all_finite
    monkeypatch.setattr(finite_guard, "all_finite", lambda *x: looked.append(1) or all_finite(*x))
    with apply_psa(pipe, preset()), pytest.warns(PSAFallbackWarning):
        WAN.run(pipe)
    per_step = [len([1 for _, step in calls if step == wanted]) for wanted in range(4)]
    assert per_step == [0, 8, 8 + 4, 8]  # two branches of four layers; the first branch of the step came twice
    assert len(looked) == 3 * 2 + 1  # the transformer's output, once a forward


def test_a_sound_run_looks_once_a_forward(monkeypatch):
    looked = []
    all_finite = finite_guard.all_finite
    monkeypatch.setattr(finite_guard, "all_finite", lambda *x: looked.append(1) or all_finite(*x))
    monkeypatch.setattr("psa_diffusers.patch.attend.all_finite", None)  # never called
    pipe = WAN.make()
    with apply_psa(pipe, preset()) as psa:
        WAN.run(pipe)
    assert len(looked) == 3 * 2 and psa.stats().not_finite == {}


def test_the_next_run_starts_afresh(spoil, monkeypatch):
    pipe = WAN.make()
    with apply_psa(pipe, preset()) as psa:
        sound = WAN.run(pipe)
        with monkeypatch.context() as patch:
            sparse = TokenAttention.sparse
            spoil()
            with pytest.warns(PSAFallbackWarning):
                WAN.run(pipe)
            patch.setattr(TokenAttention, "sparse", sparse)
            assert torch.equal(WAN.run(pipe), sound)
        assert psa.stats().not_finite == {} and psa.stats().fallbacks == {}
        assert not any(note.reason for forward in psa.processor._runs._run.notes for note in forward)
        assert not psa.processor._runs._run.watch


def test_strict_raises(spoil):
    pipe = WAN.make()
    spoil()
    with apply_psa(pipe, preset(), strict=True):
        for _ in range(2):  # a layer that was at fault in the last run is told of again
            with pytest.raises(PSAFallbackError, match=SAID):
                WAN.run(pipe)


def test_fallbacks_are_counted_once_though_a_forward_came_twice(spoil):
    """The first layer has a processor of somebody's own."""

    class Own(WanAttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    pipe = WAN.make()
    pipe.transformer.blocks[0].attn1.set_processor(Own())
    spoil()
    with pytest.warns(PSAFallbackWarning), apply_psa(pipe, preset()) as psa:
        WAN.run(pipe)
    assert [count for reason, count in psa.stats().fallbacks.items() if "Own" in reason] == [3 * 2]


def test_lists_of_spoiled_queries_serve_no_later_step(monkeypatch):
    """Beside a cache each attention is looked at, and there the lists that were made of bad queries are dropped."""
    pipe = WAN.make()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    calls, made = [], count_selections(monkeypatch)
    sparse = TokenAttention.sparse

    def spoiled(self, layer, forward, qkv, call, exchange=None):
        before = len(made)
        if (layer.name, forward.step) == (LAYER, 1):
            qkv = (qkv[0] * float("nan"), *qkv[1:])
        result = sparse(self, layer, forward, qkv, call, exchange)
        calls.append((layer.name, forward.step, len(made) - before))
        return result

    monkeypatch.setattr(TokenAttention, "sparse", spoiled)
    with apply_psa(pipe, preset(refresh=3)), pytest.warns(PSAFallbackWarning):
        WAN.run(pipe)
    assert [made for name, step, made in calls if (name, step) == (LAYER, 2)] == [1, 1]
    assert [made for name, step, made in calls if (name, step) == ("blocks.3", 2)][1] == 0  # others are kept


def test_compiled_blocks(spoil):
    pipe = WAN.make()
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    spoil()
    with apply_psa(pipe, preset()) as psa, pytest.warns(PSAFallbackWarning, match=SAID):
        assert WAN.run(pipe).isfinite().all()
    assert psa.stats().not_finite == {LAYER: [STEP]}
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["group", "model"])
def test_offload(kind, spoil):
    pipe = WAN.make()
    if kind == "group":
        offload_groups(pipe.transformer)
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    spoil()
    with apply_psa(pipe, preset()) as psa, pytest.warns(PSAFallbackWarning, match=SAID):
        assert WAN.run(pipe).isfinite().all()
    assert psa.stats().not_finite == {LAYER: [STEP]}


def test_beside_a_cache_each_attention_is_looked_at_and_no_forward_comes_twice(spoil):
    """The cache has seen the first forward already, and would give its values back in a second one."""
    pipe = WAN.make()
    forwards = []
    hook = pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    spoil()
    with apply_psa(pipe, preset()) as psa, pytest.warns(PSAFallbackWarning, match=SAID):
        assert WAN.run(pipe).isfinite().all()
    hook.remove()
    assert len(forwards) == 4 * 2 and psa.stats().not_finite == {LAYER: [STEP]}


def spoil_module(module, at_call):
    """Makes what a module gives not finite at one of its calls, counted from 0, and ever after."""
    calls = []

    def hook(_, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) > at_call else output

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("part", ["blocks.1.ffn", "proj_out", "blocks.0.attn1.to_v"])
def test_the_model_s_own_fault_is_told_once_and_not_computed_again_and_again(part, strict, monkeypatch):
    pipe = WAN.make()
    spoil_module(pipe.transformer.get_submodule(part), at_call=4)
    forwards = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda *a, **k: forwards.append(1) or forward(*a, **k))
    message = "at step 3 of 4 is not finite with dense attention either: the model itself"
    with apply_psa(pipe, preset(), strict=strict) as psa:
        if strict:
            with pytest.raises(FloatingPointError, match=message):
                WAN.run(pipe)
            return
        with pytest.warns(RuntimeWarning, match=message) as caught:
            WAN.run(pipe)
    assert len([entry for entry in caught if entry.category is RuntimeWarning]) == 1
    assert "at step 3 of 4" in psa.stats().model_not_finite
    assert len(forwards) == 4 * 2 + 1


def test_a_run_without_sparse_attention_is_not_looked_at():
    """With dense steps only, whatever the model makes is its own matter, as in stock diffusers."""
    pipe = WAN.make()
    spoil_module(pipe.transformer.proj_out, at_call=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with apply_psa(pipe, preset(dense_steps=1.0)) as psa:
            WAN.run(pipe)
    assert psa.stats().model_not_finite is None


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_value_anywhere_is_found(device, dtype):
    x = torch.full((3, 1000, 7), torch.finfo(dtype).max, dtype=dtype, device=device)
    x[1] *= -1
    assert finite_guard.all_finite(x, x[:0])
    for value in ("nan", "inf", "-inf"):
        for place in ((0, 0, 0), (2, 999, 6), (1, 511, 3)):
            spoiled = x.clone()
            spoiled[place] = float(value)
            assert not finite_guard.all_finite(x, spoiled)
            assert not finite_guard.all_finite(spoiled.transpose(0, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(spoil):
    pipe = WAN.make().to("cuda")
    spoil()
    big = {"block": {"query": 64, "key": 16}, "float32_on_gpu": "sparse"}
    with apply_psa(pipe, preset(**big)) as psa, pytest.warns(PSAFallbackWarning, match=SAID):
        assert WAN.run(pipe).isfinite().all()
    assert psa.stats().not_finite == {LAYER: [STEP]}
