"""Motif-Video's decoder blocks attend two videos, the decoder's and the encoder's, and no text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.families.motif_video import MotifVideo
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.masks import MaskRecorder, query_block_at
from psa_testing.cases import TWO_PROMPTS
from psa_testing.families import CASES
from psa_testing.spies import spy_on_attention
from psa_testing.tiny_families import EVERYTHING, SPARSE, assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = CASES["motif-video"]
DECODER = "single_transformer_blocks.1"


def test_decoder_blocks_are_sparse_over_both_videos(monkeypatch):
    pipe, calls = CASE.make(), spy_on_attention(monkeypatch)
    with apply_psa(pipe, preset(dense_steps=0.0, order="tiles"), strict=True) as psa:
        CASE.run(pipe, num_inference_steps=1)
    assert [psa.stats().layers.index(DECODER), len(psa.stats().layers)] == [2, 3]
    seen = [(q.shape[1], options["before"], options["after"]) for (q, _, _), options, _ in calls]
    assert seen == 2 * [(192 + 16, 0, 16), (192 + 16, 0, 16), (2 * 192, 0, 0)]
    lengths = [len(options["permutation"]) for _, options, _ in calls]
    assert lengths == 2 * [192, 192, 384]


def test_a_mask_of_a_decoder_block_shows_its_own_video():
    pipe, point = CASE.make(), (0.99, 0.5, 0.0)
    with apply_psa(pipe, preset(order="tiles", tile=[1, 2, 2]), strict=True) as psa:
        recorder = MaskRecorder([DECODER], point=point)
        psa.processor.record_masks(recorder)
        CASE.run(pipe)
    [mask] = recorder.masks()
    assert (mask.grid, mask.videos) == ((3, 8, 8), 2)
    assert mask.levels.shape[-1] == 2 * 192 // mask.spec.block_key
    assert mask.first_row == query_block_at(point, mask.order, mask.spec, (3, 8, 8), 2)
    tokens = mask.query_tokens(mask.first_row)
    assert tokens.shape == (3, 8, 8) and tokens[2, 4, 0]
    numbers = mask.over_frames(np.arange(mask.levels.shape[-1]))
    assert numbers.shape == (3, 8, 8) and numbers.max() == mask.levels.shape[-1] // 2 - 1


@pytest.mark.parametrize("name", ["motif-video", "motif-video-i2v"])
def test_text_may_be_padded_on_the_left(name):
    """Between an image's tokens and the text's, too."""
    case, pipe = CASES[name], CASES[name].make()
    pipe.tokenizer.padding_side = "left"
    prompts = {} if "i2v" in name else TWO_PROMPTS
    stock = case.run(pipe, **prompts)
    with apply_psa(pipe, EVERYTHING, strict=True) as psa:
        assert_equal_to_rounding(case.run(pipe, **prompts), stock)
    assert psa.stats().density_sparse == 1
    with apply_psa(pipe, SPARSE, strict=True):
        plain = case.run(pipe, **prompts)
        pipe.transformer.register_forward_pre_hook(change_padding, with_kwargs=True)
        assert torch.equal(case.run(pipe, **prompts), plain)


def change_padding(module, args, kwargs):
    mask, text = kwargs["encoder_attention_mask"], kwargs["encoder_hidden_states"]
    assert not mask[:, 0].all() and mask[:, -1].all()
    return args, {**kwargs, "encoder_hidden_states": torch.where(mask[..., None], text, text + 3.0)}


def forward(transformer, text):
    """One forward with so many text tokens and no mask."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 33, 3, 16, 16, generator=generator)
    embeds = torch.randn(1, text, 32, generator=generator)
    with torch.no_grad():
        return transformer(noise, torch.tensor([500.0]), embeds, return_dict=False)[0]


def test_text_without_a_mask_is_text():
    pipe = CASE.make()
    stock = forward(pipe.transformer, 100)
    with apply_psa(pipe, preset(dense_steps=0.0, thresholds=[1.0, 1.0, 1.0]), strict=True) as psa, psa.run([500.0]):
        assert_equal_to_rounding(forward(pipe.transformer, 100), stock)
    assert psa.stats().density_sparse == 1


def test_text_that_looks_like_a_second_video_is_dense():
    pipe = CASE.make()
    stock = forward(pipe.transformer, 192)
    with apply_psa(pipe, preset(dense_steps=0.0)) as psa, psa.run([500.0]):
        with pytest.warns(PSAFallbackWarning, match="its 192 text tokens look like as many video tokens"):
            assert torch.equal(forward(pipe.transformer, 192), stock)
        assert psa.stats().density_run == 1
    strict = apply_psa(pipe, preset(dense_steps=0.0), strict=True)
    with strict.run([500.0]), pytest.raises(PSAFallbackError, match="without an attention mask"):
        forward(pipe.transformer, 192)


def test_it_has_no_plan_for_several_ranks():
    assert MotifVideo.parallel_plan(CASE.build().transformer) is None
