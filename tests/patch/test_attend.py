"""The attention of single calls: what is kept from one to the next, and what a call's tensors tell."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers.families import AttentionCall
from psa_diffusers.families.hunyuan_video import HunyuanVideo
from psa_diffusers.families.ltx import LTXVideo
from psa_diffusers.families.mochi import Mochi
from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import Fallbacks
from psa_diffusers.patch.list_cache import keeps_lists
from psa_diffusers.patch.run import Forward, Route, Run
from psa_diffusers.patch.schedule import _largest
from psa_diffusers.patch.sites import Layer
from psa_diffusers.patch.step_layers import StepLayers
from psa_diffusers.patch.text_padding import TextLengths
from psa_diffusers.patch.token_order import permutation_on
from psa_presets import TokenOrder
from psa_testing.spies import count_selections
from psa_testing.tiny_families import preset


def layer_of(chosen):
    (spec,), (order,) = chosen.layer_specs(1), chosen.layer_orders(1)
    return Layer("blocks.0", chosen, spec, order, keeps_lists(chosen))


def call_of(batch=1, tokens=64):
    q, k, v = torch.randn(3, batch, tokens, 2, 8).unbind()
    return (q, k, v), AttentionCall(q)


@pytest.mark.parametrize(
    ("other", "selections"),
    [
        ({}, 1),
        ({"grid": (1, 4, 16)}, 2),
        ({"batch": 1}, 2),
        ({"preset": {"thresholds": [0.2, 0.2, 0.9]}}, 2),
        ({"preset": {"order": "raster"}}, 2),
    ],
    ids=["same", "another-grid", "another-batch", "another-choice", "another-order"],
)
def test_lists_serve_calls_of_the_same_grid_and_shape_alone(other, selections, monkeypatch):
    """As many tokens may be another video, and guidance that ends in mid-run halves a batch."""
    made = count_selections(monkeypatch)
    attention, layer, run = TokenAttention(Wan, Fallbacks(strict=True)), layer_of(preset(refresh=2)), Run(steps=4)
    for step, changes in enumerate(({}, other)):
        forward = Forward(run, step, {layer.name: Route(True)}, grid=changes.get("grid", (1, 8, 8)))
        layer = layer_of(preset(refresh=2, **changes.get("preset", {})))
        qkv, call = call_of(changes.get("batch", 2))
        (head, _), _ = attention.sparse(layer, forward, qkv, call)
        assert head.shape == qkv[0].shape and head.isfinite().all()
    assert len(made) == selections


@pytest.mark.parametrize(
    ("family", "tokens", "sparse"), [(Wan, 63, 0), (Wan, 65, 0), (LTXVideo, 63, 0), (LTXVideo, 65, 1)]
)
def test_a_sequence_that_is_not_the_grid_is_dense(family, tokens, sparse):
    """Families with tokens of earlier frames may have more of them."""
    attention, layer = TokenAttention(family, Fallbacks(strict=True)), layer_of(preset())
    forward = Forward(Run(), 0, {layer.name: Route(True)}, grid=(1, 8, 8))
    route = attention.decide(forward, layer, call_of(tokens=tokens)[1])
    assert route.sparse == bool(sparse)
    assert sparse or route.reason == f"the sequence has {tokens} tokens, but the video's grid is 1 x 8 x 8"


def test_layers_with_different_tiles_have_different_permutations():
    first, second = (
        permutation_on(TokenOrder("tiles", tile), (4, 8, 8), torch.device("cpu")) for tile in ((2, 4, 4), (4, 4, 4))
    )
    assert not torch.equal(first, second)
    assert permutation_on(TokenOrder("raster", (4, 4, 4)), (4, 8, 8), torch.device("cpu")) is None


def test_text_lengths_are_those_of_the_mask_that_is_asked_about():
    """Both masks are alive, so that they are different objects."""
    lengths, masks = TextLengths(), [torch.tensor([[True, True, False]]), torch.tensor([[True, True, True]])]
    assert [lengths.of(mask, mask) for mask in (*masks, masks[0])] == [[2], [3], [2]]


def test_a_mask_that_was_written_to_is_read_again():
    attention = TokenAttention(Mochi, Fallbacks(strict=True))
    mask, video, text = torch.tensor([[True, True, False]]), torch.randn(1, 8, 4), torch.randn(1, 3, 4)
    forward, layer = Forward(Run(), 0, {"blocks.0": Route(True)}, grid=(1, 2, 4)), layer_of(preset())
    q, k, v = torch.randn(3, 1, 11, 2, 8).unbind()
    call = AttentionCall(video, text, mask)
    for real in (2, 3, 1):
        mask[:] = torch.arange(3) < real
        assert attention.decide(forward, layer, call).sparse
        (_, tail), _ = attention.sparse(layer, forward, (q, k, v), call)
        assert tail.ne(0).flatten(2).any(-1).sum() == real
    mask[:] = torch.tensor([[True, False, True]])
    assert "padding" in attention.decide(forward, layer, call).reason


def test_text_lengths_are_those_of_the_part_that_is_text():
    """The same mask may be split at another place."""
    attention = TokenAttention(HunyuanVideo, Fallbacks(strict=True))
    mask = torch.tensor([True] * 6 + [False, False])[None, None, None]
    layer = layer_of(preset())
    for video, text, real in ((4, 4, 2), (5, 3, 1), (4, 4, 2)):
        forward = Forward(Run(), 0, {layer.name: Route(True)}, grid=(1, 1, video))
        call = AttentionCall(torch.randn(1, video, 4), torch.randn(1, text, 4), mask)
        (_, tail), _ = attention.sparse(layer, forward, torch.randn(3, 1, 8, 2, 8).unbind(), call)
        assert tail.ne(0).flatten(2).any(-1).sum() == real


@pytest.mark.parametrize(
    ("timestep", "largest"),
    [
        (torch.tensor(7.5), 7.5),
        (torch.tensor([7.5, 3.0]).expand(3, 2), 7.5),
        (torch.tensor([3, 900]), 900.0),
        (torch.tensor([[0.0], [500.0]]).expand(2, 4), 500.0),
        (torch.tensor([4.0, 900.0])[1].expand(2), 900.0),
        (torch.tensor([900.25], dtype=torch.bfloat16).expand(2, 3), 900.0),
        (torch.tensor([float("nan")]), None),
    ],
)
def test_the_timestep_of_a_forward_is_the_largest_of_all_entries(timestep, largest):
    assert _largest(timestep) == largest


def test_layers_are_those_of_the_step_and_of_the_length_of_the_run():
    rules = [{"match": "0-50%", "order": "raster"}, {"match": 3, "dense": True}]
    layers = StepLayers(preset(steps=rules), ["a"])
    for step, steps in ((0, 4), (3, 4), (3, 16), (3, 4), (1, 2), (1, 4), (0, 0)):
        fresh = StepLayers(preset(steps=rules), ["a"])
        assert layers.at(step, steps) == fresh.at(step, steps), (step, steps)
    assert layers.at(0, 4)["a"].order != layers.at(2, 4)["a"].order
