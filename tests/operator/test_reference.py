"""The reference operator against the maths written down token by token, and against dense attention."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.allocation.reference import allocate
from psa_kernels.importance import reference as importance_reference
from psa_kernels.importance.reference import block_importance
from psa_kernels.layout import make_layout
from psa_testing.brute_force import brute_force

EVERYTHING = {"levels": (1,), "thresholds": (1.0,)}
# So that a block of 8 has more than one representative.
EVERY_FOURTH = Importance(query_stride=4, key_stride=4)


def inputs(queries, keys=None, *, batch=1, heads=2, head_dim=8, dtype=torch.float64):
    """Fresh random q, k, v `[B, N, H, D]`, scaled so that the softmax is neither flat nor one-hot."""
    keys = queries if keys is None else keys
    shapes = [(batch, n, heads, head_dim) for n in (queries, keys, keys)]
    return [(1.5 * torch.randn(shape, dtype=torch.float64)).to(dtype) for shape in shapes]


def dense(q, k, v, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def check(q, k, v, spec, **options):
    out, stats = psa_attention(q, k, v, spec, return_stats=True, **options)
    expected, density = brute_force(q, k, v, spec, **options)
    assert out.shape == q.shape and out.is_contiguous() and out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.density.double(), density, rtol=1e-6, atol=1e-6)


SPECS = {
    "psa-3": AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH),
    "binary": AttentionSpec(block_query=8, block_key=8, importance=EVERY_FOURTH, levels=(1,), thresholds=(0.3,)),
    "psa-2": AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, thresholds=(0.0, 0.0, 1.0)),
    "whole-block-level": AttentionSpec(
        block_query=8, block_key=8, importance=EVERY_FOURTH, levels=(1, 8), thresholds=(0.2, 0.6)
    ),
    "no-level-1": AttentionSpec(
        block_query=8, block_key=8, importance=EVERY_FOURTH, levels=(2, 4), thresholds=(0.3, 0.6)
    ),
    "levels-3-and-6": AttentionSpec(
        block_query=6,
        block_key=12,
        levels=(1, 3, 6),
        importance=Importance(query_stride=3, key_stride=3),
    ),
    "mass": AttentionSpec(
        block_query=16, block_key=8, importance=EVERY_FOURTH, rule="mass", thresholds=(0.4, 0.6, 0.9)
    ),
    "mass-floor": AttentionSpec(
        block_query=16, block_key=8, importance=EVERY_FOURTH, rule="mass", thresholds=(0.1, 0.2, 0.3), floor=0.25
    ),
    "count-floor": AttentionSpec(
        block_query=16, block_key=8, importance=EVERY_FOURTH, thresholds=(0.0, 0.1, 0.3), floor=0.2
    ),
    "rest-mean": AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, rest="mean"),
    # Of a single key the mean is the key, so that two levels of the pyramid hold single tokens.
    "rest-mean-single-keys": AttentionSpec(
        block_query=4,
        block_key=1,
        importance=Importance(query_stride=4, key_stride=1),
        levels=(1,),
        thresholds=(0.25,),
        rest="mean",
    ),
    "similarity": AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, similarity=(0.05, 0.0)),
    "similarity-long-stride": AttentionSpec(
        block_query=8,
        block_key=8,
        levels=(1, 2, 8),
        thresholds=(0.2, 0.5, 0.9),
        similarity=(-0.1, 0.1),
        importance=EVERY_FOURTH,
    ),
    "mean-statistic": AttentionSpec(block_query=16, block_key=8, importance=replace(EVERY_FOURTH, statistic="mean")),
    "pooled": AttentionSpec(block_query=16, block_key=8, importance=replace(EVERY_FOURTH, estimator="pooled")),
    "pooled-mean": AttentionSpec(
        block_query=16, block_key=8, importance=Importance("pooled", "mean", query_stride=8, key_stride=2)
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [96, 61, 13], ids=lambda n: f"n{n}")
def test_every_rule_at_aligned_and_ragged_lengths(name, tokens):
    check(*inputs(tokens), SPECS[name])


@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 40), (40, 1), (7, 8), (33, 71), (71, 33), (129, 65)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("name", ["psa-3", "mass", "similarity", "rest-mean"])
def test_query_length_unlike_key_length(name, queries, keys):
    check(*inputs(queries, keys), SPECS[name])


@pytest.mark.parametrize(("before", "after"), [(0, 5), (3, 0), (4, 9)])
@pytest.mark.parametrize("name", ["psa-3", "mass-floor", "rest-mean"])
def test_text_is_exact_and_stays_apart_from_video(name, before, after):
    check(*inputs(61 + before + after), SPECS[name], text_before=before, text_after=after)
    check(*inputs(30 + before + after, 47 + before + after), SPECS[name], text_before=before, text_after=after)


@pytest.mark.parametrize("name", ["psa-3", "similarity", "pooled"])
def test_permutation_forms_other_blocks_and_keeps_the_order_of_the_output(name):
    permutation = torch.randperm(61)
    check(*inputs(61), SPECS[name], permutation=permutation)
    check(*inputs(61 + 7), SPECS[name], permutation=permutation, text_before=2, text_after=5)


def test_batch_and_scale():
    check(*inputs(50, batch=3, heads=3), SPECS["psa-3"], scale=0.7)


def test_text_queries_have_the_scale_of_the_call():
    q, k, v = inputs(61)
    check(q, k, v, SPECS["psa-3"], text_before=4, text_after=5, scale=0.7)
    out = psa_attention(q, k, v, SPECS["psa-3"], text_before=30, text_after=31, scale=0.7)
    torch.testing.assert_close(out, dense(q, k, v, scale=0.7))


def test_only_text_or_only_text_keys():
    q, k, v = inputs(9)
    torch.testing.assert_close(psa_attention(q, k, v, SPECS["psa-3"], text_before=4, text_after=5), dense(q, k, v))
    q, k, v = inputs(30, 5)
    out, stats = psa_attention(q, k, v, SPECS["psa-3"], text_after=5, return_stats=True)
    torch.testing.assert_close(out, dense(q, k, v))
    assert stats.density.eq(1).all()


@pytest.mark.parametrize("rule", ["count", "mass"])
@pytest.mark.parametrize("tokens", [1, 8, 64, 65, 200])
def test_thresholds_that_keep_everything_give_dense_attention(rule, tokens):
    q, k, v = inputs(tokens, dtype=torch.float32)
    q[:, 0] *= 40  # a nearly one-hot row: the importance of most blocks underflows
    spec = AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, rule=rule, **EVERYTHING)
    out, stats = psa_attention(q, k, v, spec, return_stats=True)
    # Logits of several hundred: float32 rounds them by 1e-5, and so the weights.
    expected = dense(*(x.double() for x in (q, k, v))).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-4)
    assert stats.density.eq(1).all() and stats.coverage.eq(1).all()


@pytest.mark.parametrize("tokens", [64, 61, 5])
def test_identical_tokens_inside_each_block_give_dense_attention(tokens):
    """ln(count) makes one mean token weigh as much as the equal tokens it stands for, ragged groups included."""
    q, k, v = inputs(tokens)
    blocks = torch.arange(tokens) // 8 * 8
    k, v = k[:, blocks], v[:, blocks]
    spec = AttentionSpec(
        block_query=16, block_key=8, importance=EVERY_FOURTH, levels=(1, 2, 4, 8), thresholds=(0.2, 0.4, 0.7, 1.0)
    )
    torch.testing.assert_close(psa_attention(q, k, v, spec), dense(q, k, v), rtol=1e-10, atol=1e-10)
    spec = AttentionSpec(
        block_query=16, block_key=8, importance=EVERY_FOURTH, levels=(2, 4), thresholds=(0.2, 0.4), rest="mean"
    )
    torch.testing.assert_close(psa_attention(q, k, v, spec), dense(q, k, v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    q, k, v = inputs(61, dtype=dtype)
    out = psa_attention(q, k, v, SPECS["psa-3"])
    wide = psa_attention(q.float(), k.float(), v.float(), SPECS["psa-3"])
    assert out.dtype == dtype
    torch.testing.assert_close(out, wide.to(dtype), rtol=0, atol=0)


def test_strided_views_are_read_as_they_are():
    batch, tokens, heads, dim = 2, 61, 3, 8
    fused = torch.randn(batch, tokens, 3, heads, dim + 4, dtype=torch.float64)
    q, k, v = (fused[:, :, i, :, :dim] for i in range(3))
    head_major = torch.randn(batch, heads, tokens, dim, dtype=torch.float64).transpose(1, 2)
    check(q, k, v, SPECS["psa-3"])
    check(head_major, k, v, SPECS["psa-3"])


def test_same_inputs_same_bits_whatever_ran_before():
    q, k, v = inputs(200, dtype=torch.float32)
    spec = AttentionSpec(block_query=32, block_key=16)
    first = psa_attention(q, k, v, spec)
    torch.rand(7)
    psa_attention(*inputs(90, dtype=torch.float32), spec)
    assert torch.equal(first, psa_attention(q, k, v, spec))


def test_one_thread_and_several_give_the_same_bits():
    q, k, v = inputs(200, heads=3, dtype=torch.float32)
    spec = AttentionSpec(block_query=32, block_key=16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(psa_attention(q, k, v, spec))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_inference_mode_and_no_grad():
    q, k, v = inputs(61)
    expected = psa_attention(q, k, v, SPECS["psa-3"])
    with torch.inference_mode():
        a, b, c = q.clone(), k.clone(), v.clone()
        assert torch.equal(psa_attention(a, b, c, SPECS["psa-3"]), expected)
    with torch.no_grad():
        assert torch.equal(psa_attention(q.requires_grad_(), k, v, SPECS["psa-3"]), expected)


@pytest.mark.parametrize("entries", [1, 600])
@pytest.mark.parametrize("name", ["psa-3", "pooled-mean"])
def test_importance_does_not_depend_on_the_size_of_a_task(name, entries, monkeypatch):
    q, k, _ = inputs(203)
    layout = make_layout(203, 203, 2, 3, torch.randperm(198))
    whole = block_importance(q, k, layout, SPECS[name], 0.3)
    monkeypatch.setattr(importance_reference, "TASK_ENTRIES", entries)
    assert whole.shape[2] == 13
    torch.testing.assert_close(block_importance(q, k, layout, SPECS[name], 0.3), whole, rtol=1e-12, atol=1e-15)


def test_blocks_without_any_mass_are_kept_where_the_last_threshold_keeps_all():
    """Before each of them lies a share of 1, but none is skipped."""
    spec = AttentionSpec(rule="mass", thresholds=(0.5, 0.7, 1.0))
    lists = allocate(torch.tensor([1.0, 0.0, 0.0, 0.0])[None, None, None], None, spec)
    assert lists.counts.tolist() == [[[[1, 0, 3]]]]


@pytest.mark.parametrize("name", ["psa-3", "mass", "rest-mean", "similarity"])
def test_lists_that_are_returned_are_those_of_select_blocks(name):
    q, k, v = inputs(61)
    options = {"text_after": 4, "permutation": torch.randperm(57)}
    selected = select_blocks(q, k, SPECS[name], v=v, **options)
    out, stats = psa_attention(q, k, v, SPECS[name], return_stats=True, **options)
    for given in (None, selected):
        asked = {"lists": given, "return_lists": True, **options}
        whole, found, lists = psa_attention(q, k, v, SPECS[name], return_stats=True, **asked)
        assert torch.equal(whole, out) and torch.equal(found.density, stats.density)
        assert torch.equal(lists.ids, selected.ids) and torch.equal(lists.counts, selected.counts)
        again, lists = psa_attention(q, k, v, SPECS[name], **asked)
        assert torch.equal(again, out) and torch.equal(lists.ids, selected.ids)
        assert given is None or lists is given


def test_lists_of_a_call_without_video_are_empty():
    q, k, v = inputs(30, 5)
    _, lists = psa_attention(q, k, v, SPECS["psa-3"], text_after=5, return_lists=True)
    assert lists.key_blocks == 0 and lists.ids.shape == (1, 2, 2, 0) and lists.counts.sum() == 0


def test_lists_serve_another_step():
    spec = SPECS["mass"]
    q, k, v = inputs(61)
    options = {"text_after": 4, "permutation": torch.randperm(57)}
    lists = select_blocks(q, k, spec, **options)
    assert torch.equal(psa_attention(q, k, v, spec, lists=lists, **options), psa_attention(q, k, v, spec, **options))
    other_q, other_k, _ = inputs(61)
    reused = psa_attention(other_q, other_k, v, spec, lists=lists, **options)
    assert not torch.equal(reused, psa_attention(other_q, other_k, v, spec, **options))
    with pytest.raises(ValueError, match="lists: made for another call"):
        psa_attention(*inputs(90), spec, lists=lists)


@pytest.mark.parametrize(
    ("fields", "listed"), [({}, 20), ({"floor": 0.9}, 23), ({"rest": "mean"}, 25), ({"rule": "mass"}, 25)], ids=str
)
def test_lists_are_grouped_by_level_and_ascending(fields, listed):
    """The count rule lists what is attended, the others every block."""
    spec = AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, thresholds=(0.2, 0.5, 0.8), **fields)
    q, k, _ = inputs(200)
    lists = select_blocks(q, k, spec)
    assert lists.ids.dtype == torch.int16 and lists.counts.dtype == torch.int32
    assert lists.key_blocks == 25 and lists.ids.shape[3] == listed and lists.ids.is_contiguous()
    for b, h, i in itertools.product(*map(range, lists.ids.shape[:3])):
        ids, counts = lists.ids[b, h, i], lists.counts[b, h, i].tolist()
        assert fields.get("rule") == "mass" or counts == ([23, 0, 0] if "floor" in fields else [5, 8, 7])
        assert len(ids.unique()) == listed and set(ids.tolist()) <= set(range(25))
        for part in ids.split([*counts, listed - sum(counts)]):
            assert part.tolist() == sorted(part.tolist())


def test_lists_that_lack_skipped_blocks_are_refused_where_these_are_attended():
    spec = AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH)
    q, k, v = inputs(200)
    lists = select_blocks(q, k, spec)
    with pytest.raises(ValueError, match=r"lists: made for another call: .* of 25 key blocks"):
        psa_attention(q, k, v, replace(spec, rest="mean"), lists=lists)


def test_no_row_is_ever_empty():
    spec = AttentionSpec(block_query=16, block_key=8, importance=EVERY_FOURTH, levels=(1, 2), thresholds=(0.0, 1e-9))
    for tokens in (1, 9, 300):
        lists = select_blocks(*inputs(tokens)[:2], spec)
        assert lists.counts.sum(-1).eq(1).all()


def test_density_of_the_published_allocation():
    q, k, v = inputs(40 * 8, head_dim=4, heads=1)
    spec = AttentionSpec(block_query=64, block_key=8, importance=EVERY_FOURTH)
    stats = psa_attention(q, k, v, spec, return_stats=True)[1]
    assert stats.density.item() == pytest.approx(0.25) and stats.coverage.item() == pytest.approx(0.45)
    assert stats.level_shares.squeeze().tolist() == pytest.approx([0.15, 0.10, 0.20])
    assert stats.implementation == "reference"


BAD_CALLS = {
    "three dimensions": (lambda q, k, v: (q[0], k, v), {}, "q: expected a non-empty floating point tensor"),
    "integers": (lambda q, k, v: (q, k.long(), v), {}, "k: expected a non-empty floating point tensor"),
    "empty": (lambda q, k, v: (q, k[:, :0], v[:, :0]), {}, "k: expected a non-empty"),
    "last stride": (
        lambda q, k, v: (q, k, v.transpose(1, 3).contiguous().transpose(1, 3)),
        {},
        "v: expected a last stride",
    ),
    "two dtypes": (lambda q, k, v: (q, k.float(), v), {}, "k: expected torch.float64"),
    "heads": (lambda q, k, v: (q, k[:, :, :1], v), {}, "do not fit"),
    "grouped heads": (
        lambda q, k, v: (q, *(x.repeat(1, 1, 2, 1)[:, :, :3] for x in (k, v))),
        {},
        "q of 2 heads and k of 3 do not fit: expected as many heads of queries as of keys, or a multiple",
    ),
    "values": (lambda q, k, v: (q, k, v[:, 1:]), {}, "do not fit"),
    "gradient": (lambda q, k, v: (q.clone().requires_grad_(), k, v), {}, "q: requires a gradient"),
    "text": (lambda q, k, v: (q, k, v), {"text_before": 60, "text_after": 5}, "cannot hold text_before=60"),
    "negative text": (lambda q, k, v: (q, k, v), {"text_after": -1}, "text_after=-1"),
    "permutation length": (lambda q, k, v: (q, k, v), {"permutation": torch.arange(60)}, "permutation: expected int64"),
    "permutation twice": (
        lambda q, k, v: (q, k, v),
        {"permutation": torch.zeros(61, dtype=torch.int64)},
        "every index from 0 to 60 exactly once",
    ),
    "permutation of unlike lengths": (
        lambda q, k, v: (q[:, 1:], k, v),
        {"permutation": torch.arange(61)},
        "as many video queries as video keys",
    ),
    "implementation": (lambda q, k, v: (q, k, v), {"implementation": "cuda"}, "implementation='cuda': expected one of"),
}


@pytest.mark.parametrize("spec", ["psa-3", None, {"levels": (1,)}])
def test_what_is_no_spec_is_refused_by_name(spec):
    with pytest.raises(TypeError, match=f"spec: expected an AttentionSpec, got {type(spec).__name__}"):
        psa_attention(*inputs(64), spec)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_thing_its_value_and_what_is_allowed(name):
    change, options, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        psa_attention(*change(*inputs(61)), SPECS["psa-3"], **options)
