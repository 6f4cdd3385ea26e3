"""Which attention processors a family computes the same as: exactly those of diffusers that it names."""

from __future__ import annotations

import inspect
import warnings

import diffusers.models.attention_processor
import pytest
import torch
from diffusers.models.transformers import transformer_ltx, transformer_skyreels_v2, transformer_wan

from psa_diffusers import PSAProcessor
from psa_diffusers.families import FAMILIES, find_family
from psa_diffusers.families.cogvideox import CogVideoX
from psa_diffusers.families.ltx import LTXVideo
from psa_diffusers.families.rotation import rotate_tokens
from psa_diffusers.families.skyreels_v2 import SkyReelsV2
from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.modules import attention_modules, find_transformers
from psa_testing.families import CASES

WanAttnProcessor = transformer_wan.WanAttnProcessor


class Stronger(WanAttnProcessor):
    """A processor of somebody's own."""

    def __call__(self, *arguments, **settings):
        return 1.5 * super().__call__(*arguments, **settings)


def first_transformer(name):
    return next(iter(find_transformers(CASES[name].build()).values()))


@pytest.mark.parametrize("name", CASES)
def test_those_of_every_pipeline_are_imitated(name):
    transformer = first_transformer(name)
    family = find_family(transformer)
    for attn in family.self_attentions(transformer).values():
        assert family.why_not_imitated(attn.processor) is None


@pytest.mark.parametrize("name", CASES)
def test_all_their_arguments_come_through(name):
    """diffusers leaves out what is not in the signature of the processor that is set."""
    taken = set(inspect.signature(PSAProcessor.__call__).parameters)
    transformer = first_transformer(name)
    for attn in attention_modules(transformer):
        stock = inspect.signature(attn.processor.__call__).parameters
        assert set(stock) - {"args", "kwargs"} <= taken, type(attn.processor)


def test_what_is_derived_from_one_is_not():
    message = "its processor Stronger is not one that Wan 2.1 and 2.2 is known to compute (WanAttnProcessor)"
    assert Wan.why_not_imitated(Stronger()) == message
    same = type("Unchanged", (WanAttnProcessor,), {})
    assert "its processor Unchanged is not one" in Wan.why_not_imitated(same())


def test_what_only_has_the_name_of_one_is_not():
    other = type("WanAttnProcessor", (WanAttnProcessor,), {"__module__": "elsewhere"})
    assert "its processor WanAttnProcessor of elsewhere is not one" in Wan.why_not_imitated(other())


def test_one_of_another_family_is_not():
    assert SkyReelsV2.why_not_imitated(WanAttnProcessor()) is not None
    assert SkyReelsV2.why_not_imitated(transformer_skyreels_v2.SkyReelsV2AttnProcessor()) is None
    assert Wan.why_not_imitated(transformer_skyreels_v2.SkyReelsV2AttnProcessor()) is not None


def test_fused_and_deprecated_ones_are():
    fused = diffusers.models.attention_processor.FusedCogVideoXAttnProcessor2_0()
    assert CogVideoX.why_not_imitated(fused) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # Both make one of the class that replaced them.
        assert Wan.why_not_imitated(transformer_wan.WanAttnProcessor2_0()) is None
        assert LTXVideo.why_not_imitated(transformer_ltx.LTXVideoAttentionProcessor2_0()) is None


def test_a_family_names_its_own():
    for family in FAMILIES:
        assert family.processors and all("AttnProcessor" in name for name in family.processors), family
        assert family.name in family.why_not_imitated(object())


def test_tables_may_be_elsewhere():
    """As EasyAnimate's are, which it makes on the CPU."""
    tables = (torch.ones(4, 8), torch.zeros(4, 8))
    rotated = rotate_tokens(tables, torch.empty(1, 4, 2, 8, device="meta"))
    assert rotated.device.type == "meta"
