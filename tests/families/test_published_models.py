"""Every supported checkpoint at its full size, on the meta device: what its family sees of it."""

from __future__ import annotations

import math

import pytest
import torch

from psa_diffusers.families import AttentionCall, find_family
from psa_testing.families import HERE, NETWORKS, PUBLISHED
from psa_testing.full_size import Noise, query_projection

NOISE = Noise(torch.bfloat16, "meta", padding=0.0, tiny=False)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_a_published_configuration(published):
    transformer = published.shapes()
    family = find_family(transformer)
    attentions = family.self_attentions(transformer)
    inputs = NETWORKS[published.model].noise_inputs(transformer.config, published.latents, NOISE)
    assert len(attentions) == len(set(attentions.values())) == published.layers
    assert family.token_grid(transformer, {**inputs, **published.inputs}) == published.grid
    assert (family.text == "none") == (published.text == 0)
    tokens = math.prod(published.grid)
    for attn in (next(iter(attentions.values())), list(attentions.values())[-1]):
        width = query_projection(attn).in_features
        added = getattr(attn, "add_q_proj", None)
        text_width = width if added is None else added.in_features
        video = torch.empty(1, tokens, width, device="meta")
        text = torch.empty(1, published.text, text_width, device="meta") if published.text else None
        call = AttentionCall(video, text)
        projected = family.project(attn, call)
        expected = (1, tokens + published.text, published.heads, published.head_dim)
        assert [tuple(x.shape) for x in projected] == [expected] * 3
        parts = (None if n == 0 else projected[0][:, :n] for n in (tokens, published.text))
        result = family.output(attn, call, *parts)
        hidden = result[0] if published.text else result
        assert hidden.shape == (1, tokens, width)


def test_hunyuan_video_1_5_chooses_these_sizes():
    """Its size follows from its configuration alone."""
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    choose = HunyuanVideo15ImageProcessor().calculate_default_height_width
    sizes = {p.config["target_size"]: p.grid[1:] for p in PUBLISHED if p.model.startswith("HunyuanVideo15")}
    assert {target: tuple(x // 16 for x in choose(9, 16, target)) for target in sizes} == sizes


def test_every_transformer_of_every_family_is_published_and_has_a_toy():
    known = {name for family in HERE for name in family.transformers}
    assert known == {published.model for published in PUBLISHED} == set(NETWORKS)
    assert known == {published.model for published in PUBLISHED if published.toy}
