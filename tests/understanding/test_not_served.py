"""What is not served runs as before, to the bit, with one line that says why; `strict` raises that line instead."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from psa_testing.tiny_language_models import SMALL, SPARSE, tiny
from psa_transformers import PSAFallbackError, PSAFallbackWarning, apply_psa

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[[Any, dict[str, Any]], torch.Tensor]


def forward(model, given, **changes):
    with torch.no_grad():
        return model(**(given | changes)).logits


def packed(model, given):
    length = given["input_ids"].shape[1]
    positions = torch.cat([torch.arange(100), torch.arange(length - 100)])[None]
    return forward(model, {"input_ids": given["input_ids"]}, position_ids=positions, use_cache=False)


def ready_made(model, given):
    length = given["input_ids"].shape[1]
    return forward(model, given, attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool).tril())


def computed(model, given):
    """As models with an indexer ask for their mask: it has to be there."""
    asked = functools.partial(create_causal_mask, allow_is_causal_skip=False)
    with mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", asked):
        return forward(model, given)


def with_dropout(model, given):
    model.train()
    torch.manual_seed(0)
    try:
        return forward(model, given)
    finally:
        model.eval()


def with_gradient(model, given):
    out = model(**given).logits
    out.sum().backward()
    model.zero_grad()
    return out.detach()


class Coarse(cache_utils.QuantizedLayer):
    """Keeps keys and values in bfloat16."""

    def __init__(self):
        super().__init__(axis_key=0, axis_value=0)

    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, tensor):
        return tensor.float()


def quantised(model, given):
    return forward(model, given, past_key_values=cache_utils.Cache(layers=[Coarse() for _ in range(2)]))


def holes(model, given):
    mask = given["attention_mask"].clone()
    mask[:, 40:50] = 0
    return forward(model, given, attention_mask=mask)


def weights(model, given):
    model.set_attn_implementation(model.config._attn_implementation)
    with torch.no_grad():
        return torch.cat(model(**given, output_attentions=True).attentions)


def configured_weights(model, given):
    with torch.no_grad():
        return torch.cat(model(**given).attentions)


def direct(**arguments: Any) -> Run:
    """A call of the registered function as a layer makes it, with an argument that no model of these has."""

    def run(model, given):
        q, k, v = torch.randn(3, 1, 4, 96, 8, generator=torch.Generator().manual_seed(1))
        layer = model.model.layers[0].self_attn
        attend = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
        with torch.no_grad():
            return attend(layer, q, k[:, :2], v[:, :2], None, scaling=1.0, **arguments)[0]

    return run


MORE = "a mask that is more than causal: packed sequences, or tokens that attend both ways"
EAGER = {"attn_implementation": "eager"}
FULL = {"layer_types": ["full_attention"] * 2}
CASES: dict[str, tuple[str, dict[str, Any], Run, str]] = {
    "sliding window": ("Mistral", {"sliding_window": 32}, forward, "a sliding window"),
    "soft cap": ("Gemma2", EAGER | FULL, forward, "a soft cap on the logits"),
    "sinks": (
        "GptOss",
        EAGER | FULL | {"num_local_experts": 2, "num_experts_per_tok": 1},
        forward,
        "attention sinks that are learned (s_aux)",
    ),
    "packed": ("Llama", {}, packed, MORE),
    "both ways": ("Gemma3", FULL | {"use_bidirectional_attention": True}, forward, "attention that is not causal"),
    "computed": ("Llama", {}, computed, "a mask that the model computes with"),
    "ready-made": ("Llama", {}, ready_made, "a mask that did not come from the mask functions of transformers"),
    "dropout": ("Llama", {"attention_dropout": 0.5}, with_dropout, "dropout, as in training"),
    "gradient": ("Llama", {}, with_gradient, "a gradient is asked for; use torch.no_grad()"),
    "quantised": ("Llama", {}, quantised, "a quantised cache"),
    "holes": (
        "Llama",
        {},
        holes,
        "padding between the tokens of a prompt; only that before and after them is cut off",
    ),
    "weights": ("Llama", EAGER, weights, "output_attentions asks for the attention weights"),
    "configured weights": (
        "Llama",
        EAGER | {"output_attentions": True},
        configured_weights,
        "output_attentions asks for the attention weights",
    ),
    "position bias": ("Llama", {}, direct(position_bias=torch.zeros(1, 4, 96, 96)), "a position bias"),
    "paged": ("Llama", {}, direct(read_index=torch.zeros(1)), "continuous batching (a paged cache)"),
    "unknown": ("Llama", {}, direct(novelty=1), "an argument that is not known: novelty"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_runs_as_before_with_a_line(case):
    name, changes, run, reason = CASES[case]
    model, given = tiny(name, **changes)
    before = run(model, given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PSAFallbackWarning)
        with apply_psa(model, SPARSE, **SMALL) as psa:
            assert torch.equal(run(model, given), before)
            run(model, given)
            stats = psa.stats()
    told = [str(each.message) for each in caught if each.category is PSAFallbackWarning]
    assert told == [f"attention runs as without PSA: {reason}"]
    assert set(stats.fallbacks) == {reason} and stats.fallbacks[reason] == stats.calls
    assert stats.sparse_calls == 0 and stats.density is None
    with apply_psa(model, SPARSE, **SMALL, strict=True), pytest.raises(PSAFallbackError) as raised:
        run(model, given)
    assert str(raised.value) == f"strict: attention would run as without PSA: {reason}"
    assert torch.equal(run(model, given), before)


def test_other_layers_are_served_beside_sliding_ones():
    model, given = tiny("Qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1)
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="a sliding window$"):
        forward(model, given)
        stats = psa.stats()
    assert list(stats.layers) == [0] and stats.fallbacks == {"a sliding window": 1}


def test_what_is_short_is_left_alone_without_a_line():
    model, given = tiny("Mistral", sliding_window=32)
    before = forward(model, given)
    with apply_psa(model, SPARSE, strict=True) as psa:
        assert torch.equal(forward(model, given), before)
        with torch.no_grad():
            model.generate(**given, max_new_tokens=2, cache_implementation="static")
        assert psa.stats().calls == 0


def test_a_video_that_cannot_be_found():
    model, given = tiny("qwen2_5_vl")
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]}
    before = forward(model, given)
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="no input_ids and no mm_"):
        assert torch.equal(forward(model, given), before)
        assert psa.stats().sparse_calls == 0


def test_a_configuration_that_does_not_name_its_vision_tokens(monkeypatch):
    """Some have the names among what concerns vision; without any, text around a video would not be told apart."""
    model, given = tiny("llava_next_video")
    text = {"input_ids": given["input_ids"].clamp(max=180)}
    before = forward(model, text)
    monkeypatch.setattr("psa_transformers.spans.ID_NAMES", ("frame_id",))
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match="^.*: no image_token_id or"):
        assert torch.equal(forward(model, text), before)
    model.config.vision_config.frame_id = 7
    with apply_psa(model, SPARSE, strict=True, **SMALL) as psa:
        forward(model, {"input_ids": torch.tensor([[3] * 40 + [7] * 90 + [3] * 9])})
        assert psa.stats().sparse_calls == 2


def test_a_layer_that_the_configuration_does_not_count():
    model, given = tiny("llama")
    model.model.layers[1].self_attn.layer_idx = 2
    with apply_psa(model, SPARSE, **SMALL) as psa, pytest.warns(PSAFallbackWarning, match=r"layer \(layer_idx=2\)"):
        forward(model, given, use_cache=False)
        assert list(psa.stats().layers) == [0]


def test_a_cache_from_before_the_patch():
    model, given = tiny("llava_next_video")
    ids, cache = given["input_ids"], DynamicCache()
    forward(model, given, past_key_values=cache)
    with apply_psa(model, SPARSE, **SMALL), pytest.warns(PSAFallbackWarning, match="the cache holds tokens"):
        forward(model, {"input_ids": ids.where(ids != 191, 7)}, past_key_values=cache)


def test_a_cache_that_was_used_again_unseen():
    """Where the video of its first use was means nothing for what it holds now."""
    model, given = tiny("llava_next_video")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=512)
    text = torch.tensor([list(range(3, 103))])
    embeds = model.get_input_embeddings()(text).detach()
    with warnings.catch_warnings(), apply_psa(model, SPARSE, **SMALL) as psa:
        warnings.simplefilter("ignore", PSAFallbackWarning)
        forward(model, given, past_key_values=cache)
        cache.reset()
        forward(model, {"inputs_embeds": embeds}, past_key_values=cache)
        forward(model, {"input_ids": text}, past_key_values=cache)
        stats = psa.stats()
    assert stats.sparse_calls == 2 and any("holds tokens that were not seen" in reason for reason in stats.fallbacks)
