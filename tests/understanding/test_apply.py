"""apply_psa: what it takes and refuses, what it leaves behind, and what its figures say."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from psa_kernels import AttentionSpec
from psa_presets import Preset, PresetError, load_preset
from psa_testing.tiny_language_models import forward, registered, tiny
from psa_transformers import PSAFallbackError, apply_psa
from psa_transformers.settings import causal_specs

BLOCKS = {"query": 32, "key": 16}
SPARSE = Preset(name="small", block=BLOCKS, rule="budget", density=0.3)
SMALL = {"min_tokens": 64, "dense_last": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def hooks(model) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


def test_nothing_is_left_behind():
    model, given = tiny("llava_next_video")
    before = forward(model, given)  # the first forward leaves hooks of transformers
    names, found = registered(), hooks(model)
    psa = apply_psa(model, SPARSE, **SMALL)
    assert registered() != names and hooks(model) > found
    forward(model, given)
    stats = psa.stats()
    psa.restore()
    psa.restore()
    assert registered() == names and hooks(model) == found
    assert torch.equal(forward(model, given), before)
    assert psa.stats() == stats and stats.sparse_calls == 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_is_given_up_is_freed_with_its_patch():
    model, _ = tiny("llama")
    apply_psa(model, SPARSE)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_error_restores():
    model, _ = tiny("llama")
    names = registered()
    with pytest.raises(RuntimeError, match="mine"), apply_psa(model, SPARSE, **SMALL):
        raise RuntimeError("mine")
    assert registered() == names and model.config._attn_implementation == "sdpa"


def test_a_second_patch_takes_the_place_of_the_first():
    model, given = tiny("llama")
    names, before = registered(), forward(model, given)
    first = apply_psa(model, SPARSE, **SMALL)
    with apply_psa(model, SPARSE, **SMALL) as second:
        forward(model, given)
    assert (first.stats().calls, second.stats().calls) == (0, 2)
    first.restore()
    assert registered() == names and torch.equal(forward(model, given), before)


def test_two_models_at_once():
    (one, given), (other, _) = tiny("llama"), tiny("qwen3")
    with apply_psa(one, SPARSE, **SMALL) as first:
        with apply_psa(other, SPARSE, **SMALL) as second:
            forward(one, given)
        forward(one, given)
    assert (first.stats().calls, second.stats().calls) == (4, 0)


def test_another_implementation_that_was_chosen_since_stays():
    model, _ = tiny("llama")
    with apply_psa(model, SPARSE):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_an_implementation_of_ones_own_computes_what_is_not_served():
    calls = []

    def attend(module, *tensors, **arguments):
        calls.append("attend")
        return sdpa_attention_forward(module, *tensors, **arguments)

    def mask(**arguments):
        calls.append("mask")
        return sdpa_mask(**arguments)

    AttentionInterface.register("mine", attend)
    AttentionMaskInterface.register("mine", mask)
    try:
        model, given = tiny("llama")
        model.set_attn_implementation("mine")
        before = forward(model, given)
        calls.clear()
        with apply_psa(model, SPARSE, min_tokens=1000):
            assert torch.equal(forward(model, given), before)
        assert sorted(calls) == ["attend", "attend", "mask"]
        assert model.config._attn_implementation == "mine"
    finally:
        AttentionInterface._global_mapping.pop("mine")
        AttentionMaskInterface._global_mapping.pop("mine")


def test_eager_attention_computes_what_is_not_served():
    model, given = tiny("llama")
    model.set_attn_implementation("eager")
    before = forward(model, given)
    with apply_psa(model, SPARSE, min_tokens=1000):
        assert torch.equal(forward(model, given), before)


def test_a_saved_model_does_not_know_of_the_patch(tmp_path):
    model, _ = tiny("llama")
    with apply_psa(model, SPARSE):
        model.save_pretrained(tmp_path)
    assert "psa_" not in (tmp_path / "config.json").read_text()


def test_rules_for_layers_count():
    model, given = tiny("llama")
    preset = SPARSE.replace(layers=[{"match": 1, "dense": True}])
    with apply_psa(model, preset, **SMALL) as psa:
        forward(model, given)
        stats = psa.stats()
    assert (stats.calls, stats.sparse_calls, list(stats.layers), stats.fallbacks) == (2, 1, [0], {})
    with pytest.raises(PresetError, match="there is no layer 7"):
        apply_psa(model, SPARSE.replace(layers=[{"match": 7, "dense": True}]))


def test_the_density_is_the_one_that_was_asked_for():
    model, given = tiny("llama")
    found = []
    for density in (0.3, 0.6):
        with apply_psa(model, SPARSE, density=density, **SMALL) as psa:
            forward(model, given)
            found.append(psa.stats().density)
    assert found[0] < found[1] < 1


def test_what_a_shipped_preset_says_to_a_language_model():
    specs = causal_specs(load_preset("psa-auto"), 3)
    kept = {"keep_first": 1, "keep_last": 2}
    assert specs == (AttentionSpec(128, 64, (1, 2, 4), "budget", density=0.25, error_model="fitted", **kept),) * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int8_qk"}, "precision = 'int8_qk': causal attention does not have it; allowed: native"),
        (
            {"block": {"query": 32, "key": 64}},
            "block.query = 32: causal attention needs a multiple of block.key = 64; allowed: such a multiple",
        ),
        (
            {"levels": [2, 4]},
            "levels = [2, 4]: blocks beside the diagonal are exact; allowed: levels that begin with 1",
        ),
        ({"dense_steps": 1.0}, "dense_steps = 1.0: nothing would be sparse; allowed: fewer dense steps"),
        (
            {"dense_steps": 0.5, "steps": [{"match": "50%-", "dense": True}]},
            "dense_steps = 0.5: with the rules for steps, nothing would be sparse; allowed: fewer dense steps",
        ),
    ],
)
def test_a_preset_that_would_mean_something_else_is_refused(changes, message):
    model, _ = tiny("llama")
    names = registered()
    with pytest.raises(PresetError) as raised:
        apply_psa(model, SPARSE.replace(**changes))
    assert str(raised.value) == f"preset 'small': {message}"
    assert registered() == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_tokens": -1}, "min_tokens=-1: expected a number of tokens, 0 or more"),
        ({"dense_last": 1.5}, "dense_last=1.5: expected a number of tokens, 0 or more"),
        ({"min_tokens": True}, "min_tokens=True: expected a number of tokens, 0 or more"),
    ],
)
def test_an_argument_that_is_out_of_range(arguments, message):
    model, _ = tiny("llama")
    with pytest.raises(ValueError, match="^" + message):
        apply_psa(model, SPARSE, **arguments)


def test_after_an_error_in_a_layer_the_next_forward_knows_nothing_of_it():
    model, given = tiny("llava_next_video")
    text = {"input_ids": torch.tensor([[*range(3, 103)]])}
    before = forward(model, text)
    layer = model.model.language_model.layers[1]
    with apply_psa(model, Preset(block=BLOCKS, levels=[1], thresholds=[1.0]), **SMALL) as psa:
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model, given)
        hook.remove()
        assert torch.allclose(forward(model, text), before, rtol=1e-4, atol=1e-4)
        assert psa.stats().sparse_calls == 3  # one before the error, two of text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_vision_towers(family):
    """The full layer of the first: 256 patches of each of 3 frames; both layers of the second: 65 of each of 10."""
    model, given = tiny(family)
    before = forward(model, given)
    settings = {"min_tokens": 64, "dense_last": 1000, "vision": True}
    full = Preset(block=BLOCKS, levels=[1], thresholds=[1.0])
    with apply_psa(model, full, **settings) as psa:
        assert torch.allclose(forward(model, given), before, rtol=1e-4, atol=1e-4)
        stats = psa.stats()
    assert (stats.vision_calls, stats.sparse_calls) == ({"qwen2_5_vl": 3, "llava_next_video": 2}[family], 0)
    with apply_psa(model, SPARSE, **settings) as psa:
        assert not torch.allclose(forward(model, given), before, rtol=1e-5, atol=1e-5)
        assert 0.2 < psa.stats().vision_density < 0.4
    assert torch.equal(forward(model, given), before)


def test_a_vision_tower_in_training():
    """Whether its layers are computed again for their gradients is not known to them."""
    model, given = tiny("llava_next_video")
    model.train()
    with apply_psa(model, SPARSE, min_tokens=64, vision=True, strict=True):
        with pytest.raises(PSAFallbackError, match="vision tower: training mode"):
            forward(model, given)
        model.eval()
        forward(model, given)


def test_figures_are_ready_for_json():
    import json

    model, given = tiny("llama")
    with apply_psa(model, SPARSE, **SMALL) as psa:
        forward(model, given)
        assert json.loads(json.dumps(psa.stats().to_dict()))["prefills"] == 1
