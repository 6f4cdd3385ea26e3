"""Whoever else looks at tokens sees them where the model has them: replaced forwards, hooks, other processors."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers import apply_psa
from psa_testing.group_offload import offload_groups
from psa_testing.tiny_families import CASES, EVERYTHING, SPARSE, assert_equal_to_rounding
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

WAN = Case(lambda: tiny_wan(num_layers=2), {**GUIDED, **SMALL_TEXT})  # 192 tokens: 3 x 8 x 8
BY_PLACE = torch.linspace(0.5, 1.5, 192)[:, None]


def replaced_forward(pipe):
    """As camera and motion adapters replace it."""
    block = pipe.transformer.blocks[0]
    stock = block.forward
    block.forward = lambda *args, **kwargs: stock(*args, **kwargs) * BY_PLACE


def hook_on_a_block(pipe):
    pipe.transformer.blocks[0].register_forward_hook(lambda block, args, tokens: tokens * BY_PLACE)


def hook_on_the_embedding(pipe):
    gain = BY_PLACE.view(1, 1, 3, 8, 8)
    pipe.transformer.patch_embedding.register_forward_hook(lambda module, args, volume: volume * gain)


def hook_on_the_output(pipe):
    pipe.transformer.proj_out.register_forward_pre_hook(lambda module, args: (args[0] * BY_PLACE,))


def cross_attention_with_a_picture_mask(pipe):
    class Masked(WanAttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * BY_PLACE

    for block in pipe.transformer.blocks:
        block.attn2.set_processor(Masked())


CHANGES = [
    replaced_forward,
    hook_on_a_block,
    hook_on_the_embedding,
    hook_on_the_output,
    cross_attention_with_a_picture_mask,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("later", [False, True], ids=["before-the-run", "in-mid-run"])
def test_what_changes_tokens_by_their_place_does_so_beside_the_patch(change, later):
    def run(pipe):
        if not later:
            change(pipe)
            return WAN.run(pipe)

        def callback(pipe, index, timestep, values):
            if index == 1:
                change(pipe)
            return {}

        return WAN.run(pipe, callback_on_step_end=callback)

    plain, stock = WAN.run(WAN.make()), run(WAN.make())
    assert float((stock - plain).abs().max()) > 0.01, "the change is to be seen"
    pipe = WAN.make()
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(run(pipe), stock)


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox-5b", "mochi", "ltx"])
def test_every_module_sees_the_model_s_own_order(name):
    """The tokens that go into and come out of each block are those of the stock model, in their places."""
    case = CASES[name]

    def trace(preset):
        pipe, seen = case.make(), []
        for block in pipe.transformer.transformer_blocks:
            block.register_forward_hook(lambda module, args, kwargs, out: seen.append(out), with_kwargs=True)
        if preset is None:
            case.run(pipe)
        else:
            with apply_psa(pipe, preset, strict=True):
                case.run(pipe)
        return seen

    stock, kept = trace(None), trace(EVERYTHING)
    assert len(stock) == len(kept) > 0
    for theirs, ours in zip(stock, kept, strict=True):
        # Of video and text the video: what a model computes of its padding is nobody's concern.
        theirs, ours = (x if torch.is_tensor(x) else x[0] for x in (theirs, ours))
        assert_equal_to_rounding(ours, theirs)


@pytest.mark.parametrize("offload", ["group", "accelerate"])
def test_offload_changes_nothing(offload):
    expected = None
    for hooked in (False, True):
        pipe = WAN.make()
        if hooked and offload == "group":
            offload_groups(pipe.transformer)
        elif hooked:
            accelerate = pytest.importorskip("accelerate")
            accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        with apply_psa(pipe, SPARSE, strict=True):
            result = WAN.run(pipe)
        expected = result if expected is None else expected
        assert_equal_to_rounding(result, expected)
