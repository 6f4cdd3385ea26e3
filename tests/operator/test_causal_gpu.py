"""The kernels of causal calls on a GPU, in half precision."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import poison_free_memory, relative_error

from psa_kernels import AttentionSpec, Importance, head_groups, psa_attention, select_blocks

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
IMPLEMENTATIONS = ["triton", *(["hopper"] if is_hopper else [])]
HEADS = [(4, 4), (7, 1), (4, 2), (28, 4)]


def random_case(seed, video_queries=False):
    """A causal call: tensors, spec and options. All of its queries may be text, unless some must be of the video."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, block_key = chance.choice([64, 128]), chance.choice([32, 64, 128])
    fitting = [factor for factor in (1, 2, 4, 8, 16) if block_key // factor >= 8]
    levels = tuple(sorted(chance.sample(fitting, chance.randint(1, len(fitting)))))
    importance = Importance(chance.choice(["sampled", "pooled"]), chance.choice(["max", "mean"]))
    kept = {"keep_first": chance.randint(0, 2), "keep_last": chance.randint(0, 3)} if levels[0] == 1 else {}
    spec = AttentionSpec(block_key=block_key, levels=levels, thresholds=(1.0,) * len(levels), importance=importance)
    rule = chance.choice(["count", "mass", "budget"])
    if rule == "budget":
        spec = replace(spec, rule=rule, density=chance.choice([0.1, 0.3, 1.0]), **kept)
    else:
        thresholds = tuple(0.8 * i / len(levels) for i in range(1, len(levels) + 1))
        similarity = chance.choice([None, (0.02,) * (len(levels) - 1)])
        spec = replace(spec, rule=rule, thresholds=thresholds, similarity=similarity, **kept)
    before, after = chance.choice([(0, 0), (0, 77), (5, 300), (200, 64)])
    video = chance.choice([chance.randint(1, 3000), 128 * chance.randint(2, 20)])
    keys = before + video + after
    queries = chance.choice([keys, keys, chance.randint(1 + after * video_queries, keys)])
    dtype = chance.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    (heads, key_heads), batch, gap = chance.choice(HEADS), chance.choice([1, 2]), chance.choice([0, 8])
    q, k, v = (
        (1.5 * torch.randn(batch, n, h, head_dim + gap, device="cuda")).to(dtype)[..., :head_dim]
        for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))
    )
    return q, k, v, spec, {"text_before": before, "text_after": after, "causal": True}


def dense(q, k, v):
    """The queries are the last of the keys."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device="cuda").tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(32))
def test_error_is_that_of_dense_half_precision(seed, implementation):
    q, k, v, spec, options = random_case(seed)
    lists = select_blocks(q, k, spec, v=v, implementation="triton", **options)
    wide = [x.double() for x in (q, k, v)]
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference", **options)
    poison_free_memory()
    out, stats = psa_attention(q, k, v, spec, lists=lists, implementation=implementation, return_stats=True, **options)
    assert stats.implementation in (implementation, "dense") and out.isfinite().all()
    # Means are rounded as they are stored; the largest weight of the Hopper kernel is too.
    assert relative_error(out, expected) <= 3.5 * relative_error(dense(q, k, v), dense(*wide))


@pytest.mark.parametrize("seed", range(16))
def test_lists_are_those_of_the_reference_but_for_roundings(seed):
    q, k, v, spec, options = random_case(seed, video_queries=True)
    poison_free_memory()
    found = select_blocks(q, k, spec, v=v, implementation="triton", **options).levels()
    known = select_blocks(*(x.float() for x in (q, k)), spec, v=v.float(), implementation="reference", **options)
    # Of random tensors many blocks are nearly as important as each other.
    assert (found != known.levels()).float().mean() < 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(12))
def test_later_tokens_change_no_earlier_output(seed, implementation):
    """To the bit: keys and values of later tokens, and whole tokens where the lists are given."""
    q, k, v, spec, options = random_case(seed)
    call = {"implementation": implementation, **options}
    out, lists = psa_attention(q, k, v, spec, return_lists=True, **call)
    changed = random.Random(seed).randrange(q.shape[1])
    place = k.shape[1] - q.shape[1] + changed
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:, place:] = 4 * torch.randn_like(x[:, place:])
    found = psa_attention(q, k, v, spec, **call)
    assert torch.equal(found[:, :changed], out[:, :changed]) and not torch.equal(found[:, changed:], out[:, changed:])
    q = q.clone()
    q[:, changed:] = torch.randn_like(q[:, changed:])
    given = psa_attention(q, k, v, spec, lists=lists, **call)
    assert torch.equal(given[:, :changed], out[:, :changed])
    block = changed - (place - options["text_before"]) % spec.block_query
    if block > 0 and place >= options["text_before"]:
        assert torch.equal(psa_attention(q, k, v, spec, **call)[:, :block], out[:, :block])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", range(8))
def test_blocks_that_are_later_are_never_read(seed, implementation):
    q, k, v, spec, options = random_case(seed)
    options = options | {"text_after": 0}
    call = {"implementation": implementation, **options}
    before, queries, keys = options["text_before"], q.shape[1], k.shape[1]
    middle = keys - queries // 2
    first = before + math.ceil(max(0, middle - before) / 128) * 128
    seen = first - (keys - queries)
    assert 0 < seen < queries
    out = psa_attention(q, k, v, spec, **call)
    k, v = k.clone(), v.clone()
    k[:, first:], v[:, first:] = torch.nan, torch.nan
    assert torch.equal(psa_attention(q, k, v, spec, **call)[:, :seen], out[:, :seen])


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
    assert torch.equal(parts, whole) and torch.equal(found.levels(), lists.levels())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_everything_kept_is_dense_attention(head_dim, implementation):
    q, k, v = (torch.randn(1, n, h, head_dim, device="cuda").bfloat16() for n, h in ((3000, 8), (4001, 2), (4001, 2)))
    spec = AttentionSpec(levels=(1,), thresholds=(1.0,))
    out, stats = psa_attention(
        q, k, v, spec, causal=True, text_after=100, implementation=implementation, return_stats=True
    )
    exact = dense(q.double(), k.double(), v.double())
    assert stats.density.eq(1).all() and relative_error(out, exact) <= 3 * relative_error(dense(q, k, v), exact)


@pytest.mark.parametrize("head_dim", [40, 160, 256])
def test_head_dims_that_only_the_portable_kernel_has(head_dim):
    q, k, v = (torch.randn(2, n, h, head_dim, device="cuda").bfloat16() for n, h in ((900, 8), (1500, 2), (1500, 2)))
    lists = select_blocks(q, k, AttentionSpec(), causal=True)
    wide = [x.double() for x in (q, k, v)]
    expected = psa_attention(*wide, AttentionSpec(), causal=True, lists=lists, implementation="reference")
    out = psa_attention(q, k, v, AttentionSpec(), causal=True, lists=lists)
    assert relative_error(out, expected) <= 3.5 * relative_error(dense(q, k, v), dense(*wide))


@pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("seed", range(24))
def test_both_attention_kernels_agree_on_the_same_lists(seed):
    """Query by query: a row, a key or a mask that is wrong changes some of them by far more than rounding."""
    q, k, v, spec, options = random_case(seed)
    lists = select_blocks(q, k, spec, v=v, implementation="triton", **options)
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton", **options).double()
    poison_free_memory()
    out = psa_attention(q, k, v, spec, lists=lists, implementation="hopper", **options).double()
    off = (out - portable).norm(dim=-1) / portable.norm(dim=-1)
    assert off.max() < (0.03 if q.dtype == torch.bfloat16 else 0.01)


@pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")
def test_sums_that_run_over_are_computed_anew_for_their_queries_alone():
    """A query whose own key is far below a listed one; those of its tile that are earlier keep their bits."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1000, h, 128, device="cuda").bfloat16() for h in (8, 2, 2))
    spec = AttentionSpec(levels=(1,), thresholds=(1.0,))
    call = {"causal": True, "implementation": "hopper"}
    out = psa_attention(q, k, v, spec, **call)
    k[:, 100], changed = 20.0, 700
    base = psa_attention(q, k, v, spec, **call)
    q[:, changed:] = 40.0
    found = psa_attention(q, k, v, spec, **call)
    assert torch.equal(found[:, :changed], base[:, :changed]) and not torch.equal(base, out)
    # The logit of key 100 is some 9,000, that of the query's own key some ten.
    assert found.isfinite().all()
    expected = v[:, 100:101].repeat_interleave(4, 2).expand_as(found[:, changed:])
    torch.testing.assert_close(found[:, changed:], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")
def test_programs_that_keep_in_step(monkeypatch):
    from psa_kernels.causal import hopper

    q, k, v = (torch.randn(1, 9000, h, 128, device="cuda").bfloat16() for h in (28, 4, 4))
    call = {"causal": True, "implementation": "hopper", "text_after": 100}
    out = psa_attention(q, k, v, AttentionSpec(), **call)
    monkeypatch.setattr(hopper, "keeps_in_step", lambda *_: True)
    assert torch.equal(psa_attention(q, k, v, AttentionSpec(), **call), out)


@pytest.mark.parametrize("tokens", [32_768, 131_072])
def test_what_a_call_takes_beside_its_output(tokens):
    """A layer of Qwen2.5-VL-7B: no more than the output takes."""
    q, k, v = (torch.randn(1, tokens, h, 128, device="cuda", dtype=torch.bfloat16) for h in (28, 4, 4))
    for spec in (AttentionSpec(), AttentionSpec(rule="budget", density=0.25)):
        call = {"causal": True, "text_after": 512}
        psa_attention(q, k, v, spec, **call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = psa_attention(q, k, v, spec, **call)
        extra = torch.cuda.max_memory_allocated() - before - out.nbytes
        assert 0 < extra <= out.nbytes, f"{extra / out.nbytes:.2f} of the output"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ["count", "budget"])
def test_offsets_that_need_64_bits(rule, implementation):
    buffer = torch.empty(1, 2000, 1, 1_200_000, device="cuda", dtype=torch.bfloat16)
    views = [buffer[..., start : start + 64] for start in (0, 64, 128)]
    for view in views:
        view.copy_(torch.randn(view.shape, device="cuda"))
    spec = AttentionSpec(rule=rule, density=0.3 if rule == "budget" else None)
    call = {"causal": True, "text_before": 7, "text_after": 9, "implementation": implementation}
    out = psa_attention(*views, spec, **call)
    assert torch.equal(out, psa_attention(*(view.contiguous() for view in views), spec, **call))


def test_many_key_blocks():
    """Long rows of lists, in 16 bits, and places of queries far down the keys."""
    q, k, v = (torch.randn(1, n, h, 64, device="cuda").bfloat16() for n, h in ((200, 4), (400_000, 1), (400_000, 1)))
    spec = AttentionSpec(block_key=32, thresholds=(0.02, 0.05, 0.1), keep_first=1, keep_last=2)
    out, lists = psa_attention(q, k, v, spec, causal=True, return_lists=True)
    wide = [x.double() for x in (q, k, v)]
    expected = psa_attention(*wide, spec, causal=True, lists=lists, implementation="reference")
    assert math.isfinite(relative_error(out, expected)) and relative_error(out, expected) < 2e-2
