"""Only what the patch is known to compute is replaced: a processor of the user's own goes on serving its module."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.tiny_families import EVERYTHING, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(lambda: tiny_wan(num_layers=3), {**GUIDED, **SMALL_TEXT})


class Stronger(WanAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 1.5


class Unrelated:
    """A processor that shares nothing with diffusers'."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return attn.to_out[0](attn.to_v(hidden_states))


def custom(pipe, kind, blocks):
    for index in blocks:
        pipe.transformer.blocks[index].attn1.set_processor(kind())


@pytest.mark.parametrize("kind", [Stronger, Unrelated])
@pytest.mark.parametrize("by_hand", [False, True], ids=["apply_psa", "set_attn_processor"])
def test_it_serves_its_module_in_all_steps_and_is_told_of_once(kind, by_hand):
    pipe = WAN.make()
    plain = WAN.run(pipe)
    custom(pipe, kind, (0, 2))
    stock = WAN.run(pipe)
    assert float((stock - plain).abs().max()) > 0.01
    with pytest.warns(PSAFallbackWarning, match=rf"blocks\.0 and 1 more layers: .*{kind.__name__}") as caught:
        if by_hand:
            psa = PSAProcessor(pipe, EVERYTHING)
            pipe.transformer.set_attn_processor(psa)
        else:
            psa = apply_psa(pipe, EVERYTHING)
        result = WAN.run(pipe)
        WAN.run(pipe)
    assert len([w for w in caught if w.category is PSAFallbackWarning]) == 1
    torch.testing.assert_close(result, stock, rtol=0, atol=2e-5)
    stats = psa.stats()
    (reason,) = stats.fallbacks
    assert kind.__name__ in reason and stats.fallbacks[reason] == 2 * 4 * 2
    assert stats.density_sparse == 1 and stats.implementation == "reference"
    psa.restore()
    assert type(pipe.transformer.blocks[0].attn1.processor) is kind
    assert torch.equal(WAN.run(pipe), stock)


def test_strict_raises_before_anything_is_computed():
    pipe = WAN.make()
    custom(pipe, Stronger, (1,))
    with pytest.raises(PSAFallbackError, match=r"blocks\.1: .*Stronger"):
        apply_psa(pipe, preset(), strict=True)
    assert not any(isinstance(attn, PSAProcessor) for attn in pipe.transformer.attn_processors.values())
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, preset(dense_steps=0.5), strict=True))
    with pytest.raises(PSAFallbackError, match=r"blocks\.1: .*Stronger"):
        WAN.run(pipe, callback_on_step_end=lambda *_: pytest.fail("a step was made"))


def test_what_the_preset_leaves_dense_needs_no_word():
    pipe = WAN.make()
    custom(pipe, Stronger, (1,))
    stock = WAN.run(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSAFallbackWarning)
        for chosen in (preset(dense_steps=1.0), preset(layers=[{"match": "1", "dense": True}])):
            with apply_psa(pipe, chosen, strict=True):
                result = WAN.run(pipe)
            if chosen.dense_steps == 1:
                assert torch.equal(result, stock)


def test_one_that_is_set_after_the_patch_is_told_of():
    pipe = WAN.make()
    with apply_psa(pipe, EVERYTHING) as psa:
        pipe.transformer.blocks[0].attn1.set_processor(Stronger())
        with pytest.warns(PSAFallbackWarning, match="another processor, Stronger, replaced PSAProcessor"):
            result = WAN.run(pipe)
        assert sum(psa.stats().fallbacks.values()) == 2 * 4
    pipe = WAN.make()
    custom(pipe, Stronger, (0,))
    torch.testing.assert_close(result, WAN.run(pipe), rtol=0, atol=2e-5)


def test_those_of_cross_attention_are_nobody_s_business():
    pipe = WAN.make()
    for block in pipe.transformer.blocks:
        block.attn2.set_processor(Stronger())
    stock = WAN.run(pipe)
    with apply_psa(pipe, EVERYTHING, strict=True):
        torch.testing.assert_close(WAN.run(pipe), stock, rtol=0, atol=2e-5)


def test_layers_of_one_forward_may_each_have_their_own_reason():
    """One keeps a processor of the user's, one has its own back, one is dense by the preset, and one got a new one."""
    pipe = Case(lambda: tiny_wan(num_layers=5), {**GUIDED, **SMALL_TEXT}).make()
    custom(pipe, Stronger, (0,))
    chosen = preset(dense_steps=0.0, dense_last=0.0, layers=[{"match": 2, "dense": True}])
    with pytest.warns(PSAFallbackWarning, match="replaced PSAProcessor"), apply_psa(pipe, chosen) as psa:
        own = psa.processor._sites[pipe.transformer.blocks[1].attn1].original
        pipe.transformer.blocks[1].attn1.set_processor(own)
        custom(pipe, Unrelated, (3,))
        WAN.run(pipe)
        stats = psa.stats()
    assert [[value == 1 for value in row] for row in stats.density] == [[True, True, True, True, False]] * 4
    told = {reason.split(":")[0].split(",")[0]: count for reason, count in stats.fallbacks.items()}
    assert told == {"blocks.0": 2 * 4, "another processor": 2 * 4}
