"""Prefills of all kinds, equal to stock attention where everything is kept: padding, chunks, later turns, caches."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from psa_testing.tiny_language_models import FULL, IMAGE, SMALL, SPARSE, VIDEO, noise, prompt, tiny, words
from psa_transformers import apply_psa

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_fallbacks():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def forward(model, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits


def close(found, expected) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def padded(given, left: int, right: int = 0):
    """A prompt beside a longer one, with padding before and after it."""
    ids = given["input_ids"]
    length = ids.shape[1] + left + right
    other = torch.tensor([words(left, 5) + ids[0].tolist() + words(right, 6)])
    short = torch.tensor([[0] * left + ids[0].tolist() + [0] * right])
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, length - right :] = 0
    return {"input_ids": torch.cat([short, other]), "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "llava_next_video"])
@pytest.mark.parametrize("right", [0, 7])
def test_padding(family, right):
    model, given = tiny(family)
    batch = padded(given, 40, right)
    if "pixel_values_videos" in given:
        batch["pixel_values_videos"] = given["pixel_values_videos"].repeat(2, 1, 1, 1, 1)
    real = batch["attention_mask"].bool()
    before = forward(model, **batch)[real]
    with apply_psa(model, FULL, **SMALL) as psa:
        assert close(forward(model, **batch)[real], before)
        assert psa.stats().sparse_calls == 2
    with apply_psa(model, SPARSE, **SMALL):
        # A prompt's padding and its neighbours change nothing but the rotations of its positions.
        alone = {key: value[1:] for key, value in batch.items()}
        if not right:
            assert close(forward(model, **batch)[1], forward(model, **alone)[0])


def test_padding_never_leaks():
    model, given = tiny("llama")
    batch = padded(given, 40)
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), 9)}
    real = batch["attention_mask"].bool()
    with apply_psa(model, SPARSE, **SMALL):
        assert torch.equal(forward(model, **batch)[real], forward(model, **other)[real])


def test_the_future_is_never_seen():
    model, given = tiny("llama")
    ids = given["input_ids"]
    changed = ids.clone()
    changed[:, 128:] = (changed[:, 128:] + 1) % 180
    with apply_psa(model, SPARSE, min_tokens=64, dense_last=0):
        assert torch.equal(forward(model, input_ids=ids)[:, :128], forward(model, input_ids=changed)[:, :128])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [50, 64])
def test_chunked_prefill(implementation, chunk):
    model, given = tiny("llama")
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": implementation}
    chunks = options | {"prefill_chunk_size": chunk, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**given, **options)
    with apply_psa(model, FULL, **SMALL) as psa:
        found = model.generate(**given, **chunks)
        stats = psa.stats()
    assert torch.equal(found.sequences, before) and found.logits[0].isfinite().all()
    assert stats.prefills == 3  # those after which 64 tokens or more are in the cache
    with apply_psa(model, SPARSE, **SMALL) as psa:
        model.generate(**given, **chunks)
        assert psa.stats().density < 0.95


def test_chunks_that_are_padding_alone():
    """A short prompt beside a long one: its first chunks hold nothing of it."""
    model, given = tiny("llama")
    batch = padded(given, 130)
    options = {"max_new_tokens": 4, "do_sample": False}
    before = model.generate(**batch, **options)
    with apply_psa(model, FULL, strict=True, **SMALL) as psa:
        assert torch.equal(model.generate(**batch, **options, prefill_chunk_size=50), before)
        assert psa.stats().prefills == 5
    batch["attention_mask"][0] = 0
    with apply_psa(model, FULL, strict=True, **SMALL):
        found = forward(model, **batch)
    assert found.isfinite().all() and close(found[1], forward(model, **batch)[1])


def a_static_cache(model):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=512)


def a_dynamic_cache(model):
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("make", [a_dynamic_cache, a_static_cache])
@pytest.mark.parametrize("family", ["llama", "llava_next_video"])
def test_a_second_turn(family, make):
    """A turn of text alone, and one with another video."""
    model, given = tiny(family)
    later = prompt(words(100), 3, 3)["input_ids"]
    turns = [given["input_ids"], later, given["input_ids"]]
    pixels = given.get("pixel_values_videos")

    def talk():
        cache, out = make(model), []
        for ids in turns:
            more = {"pixel_values_videos": pixels} if (ids == VIDEO).any() else {}
            out.append(forward(model, input_ids=ids, past_key_values=cache, **more))
        return torch.cat(out, 1)

    before = talk()
    with apply_psa(model, FULL, **SMALL) as psa:
        assert close(talk(), before)
        # The second turn of text is exact where there is a video before it.
        assert psa.stats().prefills == (3 if family == "llama" else 2)
    with apply_psa(model, SPARSE, **SMALL):
        assert torch.equal(talk(), talk())


def test_several_videos_and_images_in_one_prompt():
    model, given = tiny("llava_next_video")
    vision = [VIDEO] * 160 + words(20, 8) + [VIDEO] * 160
    given = prompt(vision) | {"pixel_values_videos": noise(2, 10, 3, 32, 32)}
    before = forward(model, **given)
    with apply_psa(model, FULL, **SMALL):
        assert close(forward(model, **given), before)
    with apply_psa(model, SPARSE, **SMALL) as psa:
        sparse = forward(model, **given)
        assert psa.stats().density < 0.8
    assert not close(sparse, before)
    assert not (given["input_ids"] == IMAGE).any()


def test_text_around_the_video_is_exact():
    """The first layer's queries after the span attend as stock ones do, and so do those before it."""
    model, given = tiny("llava_next_video")
    seen = {}
    layer = model.model.language_model.layers[0].self_attn.o_proj
    layer.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    forward(model, **given)
    before = seen["out"]
    with apply_psa(model, SPARSE, min_tokens=64, dense_last=0):
        forward(model, **given)
    video = given["input_ids"][0] == VIDEO
    assert close(seen["out"][:, ~video], before[:, ~video])
    assert not close(seen["out"][:, video], before[:, video])


def test_token_types_tell_where_the_video_is():
    """Where both are given, types count: here they say that only a part of the placeholders is a video."""
    model, given = tiny("qwen2_5_vl")
    with apply_psa(model, SPARSE, min_tokens=64, dense_last=150) as psa:
        forward(model, **given)
        narrow = psa.stats().density
    with apply_psa(model, SPARSE, **SMALL) as psa:
        forward(model, **given)
        assert psa.stats().density < narrow


def test_a_question_of_text_alone_is_dense_after_a_video():
    model, given = tiny("llava_next_video")
    with apply_psa(model, SPARSE, **SMALL) as psa:
        cache = DynamicCache()
        forward(model, **given, past_key_values=cache)
        first = psa.stats()
        forward(model, input_ids=torch.tensor([words(30)]), past_key_values=cache)
        assert psa.stats() == first


def test_beams_and_samples():
    model, given = tiny("llama")
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    before = model.generate(**given, **options)
    with apply_psa(model, FULL, **SMALL):
        assert torch.equal(model.generate(**given, **options), before)
