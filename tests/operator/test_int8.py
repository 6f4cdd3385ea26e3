"""`precision="int8_qk"`: the reference against the maths written down token by token, and which call gets it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from outliers import rotary, with_outliers

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_kernels.backends.choose import SlowerKernelWarning, choose
from psa_kernels.quantise.reference import channel_matrices, channel_scales

SPEC = AttentionSpec(block_query=16, block_key=8, importance=Importance(query_stride=4, key_stride=4))
INT8 = replace(SPEC, precision="int8_qk")


def inputs(tokens, *, heads=2, head_dim=16, dtype=torch.float64):
    """Random q, k, v `[1, N, H, D]` that vary slowly along the tokens, keys around a mean that is not 0."""

    def smooth():
        x = torch.randn(1, tokens + 8, heads, head_dim, dtype=torch.float64)
        return x.unfold(1, 9, 1).mean(-1) * 4

    return [x.to(dtype) for x in (smooth(), smooth() + 3 * torch.randn(heads, head_dim), smooth())]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def rounded(x, step):
    """To the nearest multiple of a step, halves to the even one; 127 steps at most."""
    return [step * max(-127, min(127, round(entry / step))) for entry in x]


def new_channels(heads, k):
    """What rows of q and of k, `[N][D]`, become in other channels: a function for each, of the same products.

    `heads` are those of the queries, `[heads][N][D]`, that read these keys.
    """
    dims = range(len(k[0]))

    def scale(d):
        some_k, *others = ([rows[i * len(rows) // 256][d] for i in range(256)] for rows in (k, *heads))
        some_q = [entry for rows in others for entry in rows]
        return 2 ** math.floor(math.log2((max(some_k) - min(some_k)) / max(map(abs, some_q))) / 2)

    def sign(i, j):
        return (-1) ** ((i & j).bit_count() + (i & (i >> 1) & 0x5555).bit_count())

    scales = [scale(d) for d in dims]
    signs = [[sign(i, j) for j in dims] for i in dims]
    return (
        lambda row: [sum(row[i] * scales[i] * signs[i][j] for i in dims) for j in dims],
        lambda row: [sum(row[i] / scales[i] * signs[i][j] for i in dims) / len(dims) for j in dims],
    )


def by_hand(q, k, v, spec, lists, before, after, permutation, scale, heads=None):
    """One head, in plain numbers: q, k, v `[N][D]` to the output of each video query.

    `heads` are all those of the queries that read these keys, if there are others.
    """
    of_query, of_key = new_channels(heads or [q], k)
    q, k = [of_query(row) for row in q], [of_key(row) for row in k]
    video = range(before, len(k) - after)
    order = [video[p] for p in permutation] if permutation is not None else list(video)
    text = [t for t in range(len(k)) if t not in video]
    dims = range(len(k[0]))

    def mean_of(rows):
        return [sum(row[d] for row in rows) / len(rows) for d in dims]

    finest = [k[t] for t in text + order]
    if spec.levels[0] > 1:
        groups = [order[i : i + spec.levels[0]] for i in range(0, len(order), spec.levels[0])]
        finest = [k[t] for t in text] + [mean_of([k[t] for t in group]) for group in groups]
    mean = mean_of(finest)
    key_step = max(abs(row[d] - mean[d]) for row in finest for d in dims) / 127
    found = {}
    for i in range(0, len(order), spec.block_query):
        rows = [([k[t]], [v[t]]) for t in text]
        for j, level in enumerate(lists[i // spec.block_query]):
            if level < len(spec.levels):
                block, factor = order[j * spec.block_key : (j + 1) * spec.block_key], spec.levels[level]
                for group in (block[at : at + factor] for at in range(0, len(block), factor)):
                    rows.append(([k[t] for t in group], [v[t] for t in group]))
        keys = [rounded([a - b for a, b in zip(mean_of(ks), mean, strict=True)], key_step) for ks, _ in rows]
        for t in order[i : i + spec.block_query]:
            query = rounded(q[t], max(map(abs, q[t])) / 127)
            weights = [
                len(ks) * math.exp(scale * sum(a * b for a, b in zip(query, key, strict=True)))
                for key, (ks, _) in zip(keys, rows, strict=True)
            ]
            values = [mean_of(vs) for _, vs in rows]
            found[t] = [sum(w * x[d] for w, x in zip(weights, values, strict=True)) / sum(weights) for d in dims]
    return found


@pytest.mark.parametrize("levels", [(1, 2, 4), (2, 8)], ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["ordered", "permuted"])
def test_the_reference_is_the_maths_written_down(levels, permuted):
    spec = replace(INT8, levels=levels, thresholds=(0.2, 0.5, 0.8)[-len(levels) :])
    q, k, v = inputs(53)
    permutation = torch.randperm(48) if permuted else None
    text = {"text_before": 2, "text_after": 3, "permutation": permutation}
    lists = select_blocks(q, k, spec, **text)
    out = psa_attention(q, k, v, spec, lists=lists, **text)
    for h in range(2):
        one = (x[0, :, h].tolist() for x in (q, k, v))
        order = None if permutation is None else permutation.tolist()
        expected = by_hand(*one, spec, lists.levels()[0, h].tolist(), 2, 3, order, q.shape[-1] ** -0.5)
        for token, row in expected.items():
            torch.testing.assert_close(out[0, token, h], out.new_tensor(row), rtol=1e-9, atol=1e-9)


def test_heads_that_share_keys_share_their_channels():
    """Each channel's scale is that of the largest entry in any of these heads."""
    q, k, v = inputs(53, heads=4)
    q = q * 2.0 ** torch.randint(-4, 5, q.shape[2:])
    k, v = k[:, :, :2], v[:, :, :2]
    spec = replace(INT8, thresholds=(0.2, 0.5, 0.8))
    lists = select_blocks(q, k, spec)
    out = psa_attention(q, k, v, spec, lists=lists)
    for h in range(4):
        sharing = q[0, :, h // 2 * 2 : h // 2 * 2 + 2].transpose(0, 1).tolist()
        one = q[0, :, h].tolist(), k[0, :, h // 2].tolist(), v[0, :, h // 2].tolist()
        expected = by_hand(*one, spec, lists.levels()[0, h].tolist(), 0, 0, None, 0.25, heads=sharing)
        for token, row in expected.items():
            torch.testing.assert_close(out[0, token, h], out.new_tensor(row), rtol=1e-9, atol=1e-9)


def test_only_the_attention_of_video_queries_changes():
    q, k, v = inputs(69)
    lists = [select_blocks(q, k, spec, text_after=5) for spec in (SPEC, INT8)]
    assert torch.equal(lists[0].ids, lists[1].ids) and torch.equal(lists[0].counts, lists[1].counts)
    native, int8 = (psa_attention(q, k, v, spec, text_after=5) for spec in (SPEC, INT8))
    assert torch.equal(native[:, 64:], int8[:, 64:])
    assert 1e-4 < relative_error(int8[:, :64], native[:, :64]) < 0.02


def test_what_all_keys_share_costs_no_accuracy():
    """Such a mean would take up most of the 8 bits."""
    q, k, v = inputs(200)
    far = k + 40 * torch.randn(k.shape[2:])
    errors = [relative_error(psa_attention(q, x, v, INT8), psa_attention(q, x, v, SPEC)) for x in (k, far)]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("factor", [20, 50])
@pytest.mark.parametrize("kind", ["alone", "shared", "undone"])
@pytest.mark.parametrize("channels", [[70], [3], [2, 60], [8, 9, 10, 11], list(range(40, 48))], ids=str)
def test_channels_of_keys_that_are_much_larger_cost_no_accuracy(channels, kind, factor):
    """Without a rotation and scales, errors are up to 30 times as large. Half of the channels are rotary."""
    q, k, v = inputs(512, heads=1, head_dim=128)
    spec = AttentionSpec(block_query=128, block_key=32, thresholds=(0.3, 0.6, 1.0))
    errors = []
    for turned in ((q, k), with_outliers(q, k, kind, channels, factor)):
        turned = [rotary(x) for x in turned]
        lists = select_blocks(*turned, spec)
        native, int8 = (
            psa_attention(*turned, v, replace(spec, precision=p), lists=lists) for p in ("native", "int8_qk")
        )
        errors.append(relative_error(int8, native))
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("factor", [20, 50])
def test_nor_do_they_where_the_logits_grow_with_them(factor):
    """Random tokens, queries as they were: a rotation alone makes errors up to 3 times as large."""
    q, k, v = torch.randn(3, 1, 1024, 1, 128, dtype=torch.float64)
    spec = AttentionSpec(thresholds=(0.3, 0.6, 1.0))
    errors = []
    for channels in ([], [3], [8, 9, 10, 11]):
        larger = k.clone()
        larger[..., channels] *= factor
        lists = select_blocks(q, larger, spec)
        both = spec, replace(spec, precision="int8_qk")
        native, int8 = (psa_attention(q, larger, v, which, lists=lists) for which in both)
        errors.append(relative_error(int8, native))
    assert max(errors[1:]) <= 1.5 * errors[0]


@pytest.mark.parametrize("head_dim", [1, 6, 64, 80, 96, 128])
def test_new_channels_have_the_same_products(head_dim):
    scales = 2.0 ** torch.randint(-5, 6, (head_dim,)).double()
    of_queries, of_keys = channel_matrices(scales)
    torch.testing.assert_close(of_queries @ of_keys.T, torch.eye(head_dim, dtype=torch.float64), rtol=0, atol=1e-12)


def test_channels_of_which_nothing_is_known_keep_their_size():
    q, k = torch.randn(300, 2, 8), torch.randn(300, 8)
    k[:, 0], k[:, 1], q[:, :, 2] = 3.0, math.nan, 0.0
    k[:, 3] *= 1e30
    q[5, 0], k[7, 5] = math.nan, math.inf
    scales = channel_scales(q, k)
    assert scales[:3].tolist() == [1.0, 1.0, 1.0] and scales[3] == 32 and scales[4:].log2().abs().max() <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_with_a_key_that_is_not_finite_is_computed_natively(value):
    q, k, v = inputs(64)
    k[0, 20, 1, 3] = value
    everything = {"thresholds": (0.2, 0.6, 1.0)}  # so that the key is read
    lists = select_blocks(*inputs(64)[:2], replace(SPEC, **everything))
    native, int8 = (psa_attention(q, k, v, replace(spec, **everything), lists=lists) for spec in (SPEC, INT8))
    torch.testing.assert_close(native[:, :, 1], int8[:, :, 1], equal_nan=True)
    assert not native[:, :, 1].isfinite().all() and not torch.equal(native[:, :, 0], int8[:, :, 0])


def test_a_query_that_is_not_finite_gives_no_number_and_queries_of_zeros_weigh_all_alike():
    q, k, v = inputs(64)
    q[0, 7, 0, 2] = math.nan
    q[0, 9] = 0
    everything = {"levels": (1,), "thresholds": (1.0,)}
    out = psa_attention(q, k, v, replace(INT8, **everything))
    assert out[0, 7, 0].isnan().all() and out.isfinite().sum() == out.numel() - out.shape[-1]
    torch.testing.assert_close(out[0, 9], v[0].mean(0))


def test_equal_keys_are_all_that_they_have_in_common():
    q, k, v = inputs(64)
    out = psa_attention(q, k[:, :1].expand_as(k), v, replace(INT8, levels=(1,), thresholds=(1.0,)))
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


def test_hopper_multiplies_integers_where_it_pays(on_a_gpu, recwarn):
    pytest.importorskip("triton")
    spec = AttentionSpec(precision="int8_qk")
    large, small = on_a_gpu(spec), on_a_gpu(spec, tokens=1024)
    assert choose(large, "auto", True).name == "hopper-int8"
    assert choose(large, "hopper", True).name == "hopper-int8"
    assert choose(on_a_gpu(AttentionSpec()), "auto", True).name == "hopper"
    assert choose(small, "auto", True).name == "triton"
    assert not recwarn.list


@pytest.mark.parametrize(
    ("capability", "dtype", "name", "reason"),
    [
        ((9, 0), torch.float16, "hopper", "dtype torch.float16: expected torch.bfloat16"),
        ((8, 0), torch.float32, "triton", "dtype torch.float32: expected torch.bfloat16 or torch.float16"),
    ],
    ids=str,
)
def test_others_compute_natively_and_say_so_once(capability, dtype, name, reason, on_a_gpu, recwarn):
    pytest.importorskip("triton")
    call = on_a_gpu(AttentionSpec(precision="int8_qk"), capability, dtype)
    with pytest.warns(SlowerKernelWarning, match=f"precision='int8_qk' cannot be used.*{reason}"):
        assert choose(call, "auto").name == name
    recwarn.clear()
    assert choose(call, "auto").name == name
    assert not recwarn.list
    with pytest.raises(RuntimeError, match=f"strict: precision='int8_qk' cannot be used: {reason}"):
        choose(call, "auto", True)
    with pytest.raises(ValueError, match=f"implementation='{name}': {reason}"):
        choose(call, name)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_gpus_multiply_integers_in_the_portable_kernel(capability, dtype, on_a_gpu, recwarn):
    pytest.importorskip("triton")
    spec = AttentionSpec(precision="int8_qk", rest="mean")
    assert choose(on_a_gpu(spec, capability, dtype), "auto", True).name == "triton-int8"
    assert choose(on_a_gpu(AttentionSpec(), capability, dtype), "auto", True).name == "triton"
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"implementation='hopper': device cuda: expected a GPU of .* \(9, 0\)"):
        choose(on_a_gpu(spec, capability, dtype), "hopper")


def test_hopper_gets_the_portable_integers_only_by_name(on_a_gpu):
    pytest.importorskip("triton")
    call = on_a_gpu(AttentionSpec(precision="int8_qk"), dtype=torch.float16)
    assert choose(call, "triton", True).name == "triton-int8"
    rows = [choose(on_a_gpu(AttentionSpec(precision=p)), "triton").pyramid_rows(call) for p in ("native", "int8_qk")]
    # Tokens, means of 2 and 4 and queries, one byte an entry, beside 4 bytes for keys and values in 16 bits.
    assert rows[1] - rows[0] == 65_536 * (1.75 + 1) / 4


def test_integers_count_in_the_groups_of_heads(on_a_gpu):
    pytest.importorskip("triton")
    calls = [on_a_gpu(AttentionSpec(precision=precision)) for precision in ("native", "int8_qk")]
    rows = [choose(call, "hopper").pyramid_rows(call) for call in calls]
    # Keys at levels 1, 2 and 4 and queries, one byte an entry, beside 4 bytes for keys and values in 16 bits.
    assert rows[1] - rows[0] == 65_536 * (1.75 + 1) / 4
