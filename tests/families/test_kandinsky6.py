"""Kandinsky 6: sound beside the video, an image as a frame, and its super-resolution, which is not supported."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky6

from psa_diffusers import apply_psa
from psa_diffusers.families import UnsupportedModelError, find_family
from psa_diffusers.families.kandinsky6 import Kandinsky6
from psa_testing.families import CASES
from psa_testing.spies import spy_on_attention
from psa_testing.tiny_families import EVERYTHING, SPARSE, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = CASES["kandinsky6"]


def sound(pipe):
    """The audio latents of a run, `[1, C, 3]`."""
    return replace(CASE, call=lambda pipe, inputs: pipe(**inputs).audio).run(pipe, num_inference_steps=2)


def test_sound_is_exact_where_the_video_is():
    pipe = CASE.make()
    stock = sound(pipe)
    assert stock.shape == (1, 4, 3)
    with apply_psa(pipe, preset(dense_steps=1.0)):
        assert torch.equal(sound(pipe), stock)
    with apply_psa(pipe, EVERYTHING, strict=True):
        assert_equal_to_rounding(sound(pipe), stock)
    with apply_psa(pipe, SPARSE, strict=True):
        assert not torch.equal(sound(pipe), stock)


def test_only_video_among_itself_is_sparse(monkeypatch):
    pipe, calls = CASE.make(), spy_on_attention(monkeypatch)
    with apply_psa(pipe, SPARSE, strict=True) as psa:
        CASE.run(pipe, num_inference_steps=1)
    assert psa.stats().layers == ["visual_transformer_blocks.0", "visual_transformer_blocks.1"]
    # Two guidance branches of two layers; two heads are the video's, and one is the audio's.
    assert [tuple(q.shape[1:3]) for (q, _, _), _, _ in calls] == 4 * [(192, 2)]


def test_an_image_is_one_more_frame(monkeypatch):
    case, calls = CASES["kandinsky6-image"], spy_on_attention(monkeypatch)
    pipe = case.make()
    with apply_psa(pipe, SPARSE, strict=True):
        case.run(pipe, num_inference_steps=1)
    assert {q.shape[1] for (q, _, _), _, _ in calls} == {4 * 8 * 8}


def test_keys_may_have_other_positions_than_queries(monkeypatch):
    transformer = CASE.make().transformer
    attn = transformer.visual_transformer_blocks[0].video_dec_block.self_attention
    of_queries, of_keys = (transformer.audio_rope_embeddings(torch.arange(first, first + 6)) for first in (0, 10))
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    seen, dispatch = [], transformer_kandinsky6.dispatch_attention_fn
    monkeypatch.setattr(
        transformer_kandinsky6, "dispatch_attention_fn", lambda *qkv, **more: seen.extend(qkv) or dispatch(*qkv, **more)
    )
    attn(x, rope_q=of_queries, rope_kv=of_keys)
    call = Kandinsky6.call({"hidden_states": x, "rotary_emb": of_queries, "rotary_emb_kv": of_keys})
    for mine, stock in zip(Kandinsky6.project(attn, call), seen, strict=True):
        torch.testing.assert_close(mine, stock, rtol=0, atol=1e-6)


def test_super_resolution_is_refused():
    kind = diffusers.Kandinsky6SRTransformer3DModel
    module = kind.__new__(kind)
    with pytest.raises(UnsupportedModelError, match=r"because it has sparse attention of its own \(NABLA\), always"):
        find_family(module)
