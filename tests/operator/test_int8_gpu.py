"""The kernel for Hopper on 8-bit integers against its definition in float64, on random inputs and on hostile ones.

What its results may differ by is not set: it is taken from what the portable kernel in bfloat16 differs by from its own
definition, on the same inputs.
"""

from __future__ import annotations

import gc
import math
import random
from dataclasses import replace

import not_finite
import pytest
import torch
from gpu_checks import poison_free_memory, random_call, relative_error
from outliers import rotary, with_outliers

from psa_kernels import AttentionSpec, BlockLists, head_groups, psa_attention, select_blocks
from psa_kernels.layout import make_layout

pytest.importorskip("triton")
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")]

EVERYTHING = AttentionSpec(levels=(1,), thresholds=(1.0,))


def int8(spec):
    return replace(spec, precision="int8_qk")


def tensors(shape, tokens, gap=0):
    """q, k, v in bfloat16. Entries of k are multiples of 1/4 up to 2, of which means over up to 16 keys are exact too.

    Else a mean rounded to bfloat16 would fall to another integer than the exact one now and then.
    """
    batch, heads, head_dim = shape
    queries, keys = ((batch, n, heads, head_dim + gap) for n in tokens)
    q, v = (1.5 * torch.randn(size, device="cuda") for size in (queries, keys))
    k = torch.randint(-8, 9, keys, device="cuda") / 4
    return [x.bfloat16()[..., :head_dim] for x in (q, k, v)]


def errors(q, k, v, spec, lists, **options):
    """Relative errors: of the kernel against its definition, of the portable one against its own, of the definition."""
    wide = [x.double() for x in (q, k, v)]
    exact, defined = (
        psa_attention(*wide, which, lists=lists, implementation="reference", **options) for which in (spec, int8(spec))
    )
    poison_free_memory()
    found, stats = psa_attention(
        q, k, v, int8(spec), lists=lists, implementation="hopper", return_stats=True, **options
    )
    assert stats.implementation == "hopper-int8"
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton", **options)
    poison_free_memory()
    again = psa_attention(q, k, v, int8(spec), lists=lists, implementation="hopper", **options)
    assert torch.equal(again, found)
    return relative_error(found, defined), relative_error(portable, exact), relative_error(defined, exact)


def errors_of_all(q, k, v, spec, lists):
    """Relative errors against exact attention: of the kernel, of the portable one in bfloat16, of the definition."""
    wide = [x.double() for x in (q, k, v)]
    exact, defined = (
        psa_attention(*wide, which, lists=lists, implementation="reference") for which in (spec, int8(spec))
    )
    portable = psa_attention(q, k, v, spec, lists=lists, implementation="triton")
    found = psa_attention(q, k, v, int8(spec), lists=lists, implementation="hopper")
    return [relative_error(x, exact) for x in (found, portable, defined)]


def all_at(level, levels, q, k, spec, text=0):
    blocks = math.ceil((q.shape[1] - text) / spec.block_query), math.ceil((k.shape[1] - text) / spec.block_key)
    chosen = torch.full((q.shape[0], q.shape[2], *blocks), level, device="cuda")
    return BlockLists.from_levels(chosen, levels)


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("tokens", [128, 256, 1024, 1000])
def test_dense_calls_are_the_definition_to_rounding(tokens, head_dim):
    q, k, v = tensors((1, 1, head_dim), (tokens, tokens))
    found, portable, defined = errors(q, k, v, EVERYTHING, all_at(0, 1, q, k, EVERYTHING))
    assert found <= 1.4 * portable
    assert defined > 2 * portable  # else the comparison could not tell integers from bfloat16


def random_case(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    head_dim, spec, before, after, video, keys, permutation = random_call(chance)
    shape = chance.choice([1, 2]), chance.choice([1, 3]), head_dim
    q, k, v = tensors(shape, (video + before + after, keys + before + after), chance.choice([0, 8]))
    if keys % 16:
        # Nor is the mean of a group of another size exact, unless its keys are equal.
        places = torch.arange(video, device="cuda") if permutation is None else permutation
        places = before + (places if keys == video else torch.arange(keys, device="cuda"))[-(keys % 16) :]
        k[:, places] = k[:, places[:1]]
    chosen = torch.randint(
        0, len(spec.levels) + 1, (*shape[:2], math.ceil(video / 128), math.ceil(keys / spec.block_key)), device="cuda"
    )
    chosen[..., chance.randrange(chosen.shape[-1])] = chance.randrange(len(spec.levels))
    lists = BlockLists.from_levels(chosen, len(spec.levels))
    return q, k, v, spec, lists, {"text_before": before, "text_after": after, "permutation": permutation}


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_definition_to_rounding(seed):
    q, k, v, spec, lists, options = random_case(seed)
    found, portable, defined = errors(q, k, v, spec, lists, **options)
    assert found <= 1.4 * portable + 0.02 * defined


@pytest.mark.parametrize("head_dim", [64, 128])
def test_ordinary_keys_lose_no_more_than_the_definition_says(head_dim):
    """Smooth along the tokens, with a mean that is not 0; means are rounded to bfloat16 before they are quantised."""
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    q, k, v = (torch.randn(1, 4096 + 8, 2, head_dim, device="cuda").unfold(1, 9, 1).mean(-1).mul(4) for _ in range(3))
    k = k + 2 * torch.randn(2, head_dim, device="cuda")
    q, k, v = (x.bfloat16() for x in (q, k, v))
    lists = select_blocks(q, k, spec)
    found, rounding, allowed = errors_of_all(q, k, v, spec, lists)
    print(f"relative error: bfloat16 {rounding:.2e}, integers by definition {allowed:.2e}, found {found:.2e}")
    assert found <= math.hypot(1.4 * rounding, 1.25 * allowed)


@pytest.mark.parametrize("factor", [20, 50])
@pytest.mark.parametrize("kind", ["alone", "shared", "undone"])
@pytest.mark.parametrize("channels", [[3], [2, 60], [8, 9, 10, 11], list(range(40, 48))], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_channels_of_keys_that_are_much_larger_cost_no_accuracy(head_dim, channels, kind, factor):
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    q, k, v = (
        torch.randn(1, 2048 + 8, 1, head_dim, device="cuda", dtype=torch.float64).unfold(1, 9, 1).mean(-1).mul(4)
        for _ in range(3)
    )
    k = k + 2 * torch.randn(head_dim, device="cuda")
    found = []
    for turned in ((q, k), with_outliers(q, k, kind, channels, factor)):
        inputs = [x.bfloat16() for x in (*map(rotary, turned), v)]
        found.append(errors_of_all(*inputs, spec, select_blocks(*inputs[:2], spec))[0])
    assert found[1] <= 1.5 * found[0]


@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
def test_rows_of_integers_are_those_of_the_reference(permuted):
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.quantise import reference
    from psa_kernels.quantise.triton import quantise_rows

    spec = AttentionSpec()
    q, k, v = tensors((2, 3, 128), (2300, 2300), gap=8)
    k += 3 * torch.randint(-1, 2, (3, 128), device="cuda")
    q.copy_((q * 16).round() / 16)  # Sums over the channels are exact then, halves too.
    layout = make_layout(2300, 2300, 5, 95, torch.randperm(2200, device="cuda") if permuted else None)
    poison_free_memory()
    found = quantise_rows(q, build_pyramid(k, v, layout, spec, gathered=True), layout, spec, 0.1)
    for b in range(2):
        for h in range(3):
            query, exact = q[b, :, h].double(), k[b, :, h].double()
            of_queries, of_keys = reference.channel_matrices(reference.channel_scales(query[:, None], exact))
            mean, largest = reference.key_mean_and_largest(exact @ of_keys)
            torch.testing.assert_close(found.key_means[b, h].double(), exact.mean(0), rtol=1e-5, atol=1e-5)
            video = exact[layout.video_key_tokens(k.device)]
            rows = [exact[:5], exact[-95:], *(video.unflatten(0, (-1, level)).mean(1) for level in spec.levels)]
            for integers, wanted in zip(found.keys, rows, strict=True):
                difference = integers[b, h].double() - reference.to_integers(wanted @ of_keys - mean, largest)
                assert difference.abs().max() <= 1 and (difference != 0).double().mean() < 1e-3
            query = query @ of_queries
            entries = reference.largest_of_queries(query)
            assert torch.equal(found.queries[b, :, h].double(), reference.to_integers(query, entries))
            factors = (entries[:, 0] * largest / 127**2 * 0.1 / math.log(2)).float()
            torch.testing.assert_close(found.factors[b, h], factors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_log_sum_exp(head_dim):
    """That of the definition: what taking away the mean left out is added again."""
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.quantise import reference
    from psa_kernels.quantise.triton import quantise_rows
    from psa_kernels.sparse.hopper import launch as hopper

    tokens, heads, spec, scale = 1100, 2, AttentionSpec(), head_dim**-0.5
    q, k, v = tensors((1, heads, head_dim), (tokens, tokens))
    k += 2 * torch.randint(-1, 2, (heads, head_dim), device="cuda")
    layout = make_layout(tokens, tokens, 7, 5, None)
    lists = all_at(0, 3, q, k, spec, text=12)
    lse = torch.full((1, heads, tokens), torch.nan, device="cuda")
    built = build_pyramid(k, v, layout, spec)
    integers = quantise_rows(q, built, layout, spec, scale)
    hopper.sparse_attention(q, built, lists, layout, spec, scale, lse, integers=integers)
    for h in range(heads):
        queries, exact = q[0, :, h].double(), k[0, :, h].double()
        of_queries, of_keys = reference.channel_matrices(reference.channel_scales(queries[:, None], exact))
        mean, largest = reference.key_mean_and_largest(exact @ of_keys)
        keys = reference.quantised(exact @ of_keys - mean, largest)
        rotated = queries @ of_queries
        rounded = reference.quantised(rotated, reference.largest_of_queries(rotated))
        logits = (rounded @ keys.T + (rotated @ mean)[:, None]) * scale
        assert (lse[0, h] - logits.logsumexp(-1))[7:-5].abs().max() < 5e-3
        assert lse[0, h, :7].isnan().all() and lse[0, h, -5:].isnan().all()


def hostile_inputs(name):
    """Queries and keys whose later blocks exceed the first ones by more than any exponent holds."""
    q, k, v = tensors((1, 2, 128), (4096, 4096))
    direction = torch.ones(128, device="cuda") / 128**0.5
    if name.startswith("later logits"):
        q = (0.1 * q + 4 * direction).to(q.dtype)
        k[:, 3000:] = (k[:, 3000:] + direction * float(name.split()[-1]) * 128**0.5 / 4).to(k.dtype)
    elif name == "one huge key at the end":
        k[:, -1] *= 300
    elif name == "equal keys":
        k = k[:, :1].expand_as(k)
    elif name == "zeros":
        q[:, 100:300] = 0
    return q, k, v


@pytest.mark.parametrize("name", ["later logits 200", "later logits 2000"])
def test_tiles_that_run_over_are_computed_natively(name, monkeypatch):
    """Fails without the guard: what is found then is infinite or not a number."""
    from psa_kernels.sparse.hopper import launch as hopper

    q, k, v = hostile_inputs(name)
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    lists = BlockLists.from_levels(torch.randint(0, 4, (1, 2, 32, 64), device="cuda"), 3)
    found, rounding, allowed = errors_of_all(q, k, v, spec, lists)
    # Some tiles are native, some are not.
    assert found <= math.hypot(1.4 * rounding, 1.25 * allowed)
    monkeypatch.setattr(hopper.portable, "launch", lambda *_, **__: None)
    assert not psa_attention(q, k, v, int8(spec), lists=lists, implementation="hopper").isfinite().all()


@pytest.mark.parametrize("name", ["one huge key at the end", "equal keys", "zeros"])
def test_hostile_inputs_lose_no_more_than_the_definition_says(name):
    q, k, v = hostile_inputs(name)
    spec = AttentionSpec(thresholds=(0.3, 0.5, 0.9))
    lists = BlockLists.from_levels(torch.randint(0, 4, (1, 2, 32, 64), device="cuda"), 3)
    found, rounding, allowed = errors_of_all(q, k, v, spec, lists)
    assert found <= math.hypot(1.4 * rounding, 1.25 * allowed)


@pytest.mark.parametrize("value", ["nan", "inf", "minus-inf"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_is_neither_hidden_nor_spread(which, value):
    spec = int8(replace(not_finite.make_spec("count"), block_query=128))
    options = {"dtype": torch.bfloat16, "device": "cuda", "head_dim": 128}
    not_finite.check_output(which, value, spec, "hopper", 3e-2, **options)
    # A head with a key that is not finite is native.
    if which == "k":
        sound, spoiled = not_finite.spoiled_inputs(which, value, **options)
        lists = select_blocks(*sound[:2], spec, implementation="hopper")
        native = replace(spec, precision="native")
        found = psa_attention(*spoiled, spec, lists=lists, implementation="hopper")[:, :, not_finite.BAD_HEAD]
        portable = psa_attention(*spoiled, native, lists=lists, implementation="triton")[:, :, not_finite.BAD_HEAD]
        torch.testing.assert_close(found, portable, rtol=4e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("seed", range(6))
def test_groups_of_heads_change_nothing(seed, monkeypatch):
    q, k, v, spec, lists, options = random_case(seed)
    call = {"lists": lists, "implementation": "hopper", **options}
    whole = psa_attention(q, k, v, int8(spec), **call)
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 1)
    monkeypatch.setattr(head_groups, "LARGEST_SHARE", 0)
    poison_free_memory()
    assert torch.equal(psa_attention(q, k, v, int8(spec), **call), whole)


def test_pyramids_and_integers_take_no_more_memory_than_is_said(monkeypatch):
    monkeypatch.setattr(head_groups, "SMALL_PYRAMIDS", 0)
    q, k, v = tensors((1, 40, 128), (16_384, 16_384))
    call = {"permutation": torch.randperm(16_384, device="cuda"), "implementation": "hopper"}
    psa_attention(q, k, v, int8(AttentionSpec()), **call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    psa_attention(q, k, v, int8(AttentionSpec()), **call)
    extra = torch.cuda.max_memory_allocated() - before
    rest = 2**26  # lists, importance, representatives and the like
    assert q.nbytes < extra < q.nbytes + head_groups.LARGEST_SHARE * q.nbytes + rest


def test_no_call_waits_for_the_device_or_keeps_memory():
    q, k, v, spec, lists, options = random_case(1)
    call = {"lists": lists, "return_stats": True, "implementation": "hopper", **options}
    psa_attention(q, k, v, int8(spec), **call)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            psa_attention(q, k, v, int8(spec), **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    gc.collect()
    assert torch.cuda.memory_allocated() == before
