"""What may be around a forward: autocast, gradient checkpointing, threads, adapters, copies, shared configurations."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model

from psa_kernels import psa_attention
from psa_testing.tiny_language_models import FULL, SMALL, SPARSE, forward, tiny, words
from psa_transformers import PSAFallbackWarning, apply_psa

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_the_operator_is_given_the_dtype_of_autocast(monkeypatch):
    model, given = tiny("llama")
    seen = []

    def spy(q, k, v, *rest, **more):
        seen.append({q.dtype, k.dtype, v.dtype})
        return psa_attention(q, k, v, *rest, **more)

    monkeypatch.setattr("psa_transformers.patch.psa_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16), apply_psa(model, SPARSE, **SMALL):
        forward(model, given)
    assert seen == [{torch.bfloat16}] * 2


def test_threads_do_not_see_one_another():
    """As a server has them: prompts of one shape, with padding and videos at other places."""
    model, given = tiny("llava_next_video")
    text = {"input_ids": torch.tensor([words(given["input_ids"].shape[1], 9)])}
    prompts = [given, text, text | {"attention_mask": (torch.arange(text["input_ids"].shape[1]) > 30).long()[None]}]
    with apply_psa(model, SPARSE, **SMALL) as psa:
        alone = [forward(model, each) for each in prompts]
        with ThreadPoolExecutor(3) as pool:
            found = [list(pool.map(lambda each: forward(model, each), prompts)) for _ in range(4)]
        assert (psa.stats().prefills, psa.stats().sparse_calls) == (15, 30)
    for each in found:
        assert all(torch.equal(one, other) for one, other in zip(each, alone, strict=True))


@pytest.mark.parametrize(
    ("family", "place"), [("llama", "layers.0.self_attn.q_proj"), ("llava_next_video", "vision_tower")]
)
def test_a_patch_ends_between_two_forwards(family, place):
    """A thread that generates outlives the `with` statement: half a forward would attend the future."""
    model, given = tiny(family)
    before, out = forward(model, given), {}
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go_on.wait(5)

    model.model.get_submodule(place).register_forward_hook(hold)
    thread = threading.Thread(target=lambda: out.update(found=forward(model, given)))
    with apply_psa(model, FULL, **SMALL) as psa:
        thread.start()
        inside.wait(5)
        threading.Timer(0.2, go_on.set).start()
    assert model.config._attn_implementation == "sdpa" and psa.stats().sparse_calls == 2
    thread.join()
    assert torch.allclose(out["found"], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Its first pass may be without gradients, and what it computes again is dense."""
    model, given = tiny("llama")
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def step():
        model.zero_grad()
        out = model(**given).logits
        out.square().sum().backward()
        return out.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    before = step()
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="gradient"):
        found = step()
        assert psa.stats().sparse_calls == 0
    assert torch.equal(found[0], before[0]) and torch.equal(found[1], before[1])


def test_a_frozen_decoder_is_sparse_in_training():
    model, given = tiny("llama")
    model.train().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with apply_psa(model, SPARSE, **SMALL, strict=True) as psa:
        model(**given, labels=given["input_ids"]).loss.backward()
        assert psa.stats().sparse_calls == 2 and model.lm_head.weight.grad.isfinite().all()


def test_a_model_that_shares_a_configuration_stays_as_it_is():
    model, given = tiny("llama")
    other = type(model)(model.config).eval()
    before = forward(other, given)
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="shares its configuration"):
        assert torch.equal(forward(other, given), before) and psa.stats().sparse_calls == 0
        with pytest.raises(
            ValueError, match=r"^attn_implementation='psa_.*another model, which shares this configuration"
        ):
            apply_psa(other, SPARSE)
        forward(model, given)
        assert psa.stats().sparse_calls == 2
    apply_psa(other, SPARSE).restore()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_patched_model_is_not_copied(duplicate):
    """The copy's hooks and its way back would be those of the first."""
    model, _ = tiny("llama")
    with (
        apply_psa(model, SPARSE),
        pytest.raises(TypeError, match=r"cannot be copied or pickled: call restore\(\) first"),
    ):
        duplicate(model)
    duplicate(model)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("later", [True, False])
def test_adapters(family, later):
    """PEFT calls `forward` of the model that it wraps by itself, past the hooks of that one."""
    model, given = tiny(family)
    psa = apply_psa(model, FULL, **SMALL) if later else None
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    if psa is None:
        with pytest.raises(TypeError, match=r"^model=PeftModel: .* get_base_model\(\) is that model"):
            apply_psa(wrapped, FULL)
        psa = apply_psa(wrapped.get_base_model(), FULL, **SMALL)
    found = forward(wrapped, given)
    assert psa.stats().sparse_calls == 2 and not psa.stats().fallbacks
    psa.restore()
    assert torch.allclose(found, forward(wrapped, given), rtol=1e-4, atol=1e-4)


def test_nothing_that_transformers_gives_up_is_read(monkeypatch):
    """The cache of an output has another name than in older versions, which warns and will go."""
    model, given = tiny("llama")

    def fail(message, *_):
        raise AssertionError(message)

    with apply_psa(model, FULL, **SMALL):
        monkeypatch.setattr("transformers.utils.generic.logger.warning_once", fail)
        forward(model, given)
