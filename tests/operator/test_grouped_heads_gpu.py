"""The kernels on a GPU where several heads of the queries share one of the keys and values, in half precision."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import poison_free_memory, random_call, relative_error

from psa_kernels import AttentionSpec, head_groups, psa_attention, select_blocks

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
IMPLEMENTATIONS = ["triton", *(["hopper"] if is_hopper else [])]
HEADS = [(7, 1), (4, 2), (9, 3), (28, 4)]


def random_case(seed):
    """A call that every kernel serves, its keys of fewer heads than its queries."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, spec, before, after, video, keys, permutation = random_call(chance)
    rule = chance.choice(["count", "mass", "budget"])
    if rule == "budget":
        spec = replace(spec, rule=rule, density=chance.choice([0.1, 0.3, 1.0]))
    else:
        similarity = chance.choice([None, (0.02,) * (len(spec.levels) - 1)])
        spec = replace(spec, rule=rule, similarity=similarity)
    dtype = chance.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    (heads, key_heads), batch, gap = chance.choice(HEADS), chance.choice([1, 2]), chance.choice([0, 8])
    q, k, v = (
        (1.5 * torch.randn(batch, n + before + after, h, head_dim + gap, device="cuda")).to(dtype)[..., :head_dim]
        for n, h in ((video, heads), (keys, key_heads), (keys, key_heads))
    )
    return q, k, v, spec, {"text_before": before, "text_after": after, "permutation": permutation}


def repeated(q, k, v):
    """The same call with as many heads of keys as of queries."""
    group = q.shape[2] // k.shape[2]
    return q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(24))
def test_repeated_keys_give_the_same_bits(seed, implementation):
    """Every product is of the same numbers in the same order; text queries are PyTorch's, which may choose another."""
    q, k, v, spec, options = random_case(seed)
    call = {"implementation": implementation, "return_stats": True, "return_lists": True, **options}
    poison_free_memory()
    out, stats, lists = psa_attention(q, k, v, spec, **call)
    poison_free_memory()
    expected, wide_stats, wide_lists = psa_attention(*repeated(q, k, v), spec, **call)
    assert stats.implementation == implementation and stats.density.shape == (q.shape[0], q.shape[2])
    assert torch.equal(lists.ids, wide_lists.ids) and torch.equal(lists.counts, wide_lists.counts)
    assert torch.equal(stats.density, wide_stats.density)
    video = slice(options["text_before"], q.shape[1] - options["text_after"])
    assert torch.equal(out[:, video], expected[:, video])
    torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(12))
def test_error_is_that_of_dense_half_precision(seed, implementation):
    q, k, v, spec, options = random_case(seed)
    lists = select_blocks(q, k, spec, v=v, implementation="triton", **options)
    wide = [x.double() for x in (q, k, v)]
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    poison_free_memory()
    out = psa_attention(q, k, v, spec, lists=lists, implementation=implementation, **options)
    dense, exact = (
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in repeated(*tensors)))
        for tensors in ((q, k, v), wide)
    )
    # Means are rounded as they are stored; the largest weight of the Hopper kernel is too.
    assert relative_error(out, expected) <= 3.5 * relative_error(dense, exact)


@pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("seed", range(12))
def test_integers_of_heads_that_share_keys(seed):
    """They lose no more than the definition says, and what bfloat16 rounds besides."""
    q, k, v, spec, options = random_case(seed)
    q, k, v = (x.bfloat16() for x in (q, k + 2 * torch.randn(k.shape[2:], device="cuda"), v))
    lists = select_blocks(q, k, spec, v=v, implementation="triton", **options)
    int8, wide = replace(spec, precision="int8_qk"), [x.double() for x in (q, k, v)]
    exact, defined = (
        psa_attention(*wide, which, lists=lists, implementation="reference", **options) for which in (spec, int8)
    )
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton", **options)
    poison_free_memory()
    call = {"lists": lists, "implementation": "hopper", "return_stats": True, **options}
    out, stats = psa_attention(q, k, v, int8, **call)
    assert stats.implementation == "hopper-int8"
    rounding, allowed = relative_error(portable, exact), relative_error(defined, exact)
    assert relative_error(out, exact) <= math.hypot(1.4 * rounding, 1.25 * allowed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_groups_of_heads_change_nothing(seed, implementation, monkeypatch):
    q, k, v, spec, options = random_case(seed)
    call = {"implementation": implementation, "return_lists": True, **options}
    whole, lists = psa_attention(q, k, v, spec, **call)
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(head_groups, "LARGEST_SHARE", 0)
    poison_free_memory()
    parts, found = psa_attention(q, k, v, spec, **call)
    assert torch.equal(parts, whole) and torch.equal(found.ids, lists.ids)


def test_keys_are_not_repeated_in_memory():
    """28 heads of the queries read 4 of the keys: these, repeated, would take as much as the output, twice."""
    tokens, text, head_dim = 32_768, 256, 128
    q, k, v = (torch.randn(1, tokens, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in (28, 4, 4))
    call = {"text_after": text}
    psa_attention(q, k, v, AttentionSpec(), **call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    psa_attention(q, k, v, AttentionSpec(), **call)
    extra = torch.cuda.max_memory_allocated() - before
    blocks = math.ceil(tokens / 128) * math.ceil(tokens / 64)
    importance_and_lists = 28 * blocks * (4 + 2)
    representatives = (q.nbytes + k.nbytes) // 8
    scratch = 2**27
    assert q.nbytes < extra < q.nbytes + 2 * k.nbytes + importance_and_lists + representatives + scratch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calls_without_video_are_dense(dtype):
    q, k, v = (torch.randn(2, 300, h, 128, device="cuda").to(dtype) for h in (12, 3, 3))
    out, stats = psa_attention(q, k, v, AttentionSpec(), text_after=300, return_stats=True)
    exact = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in repeated(q, k, v))).transpose(1, 2)
    assert stats.implementation == "dense" and relative_error(out, exact) < 1e-2
