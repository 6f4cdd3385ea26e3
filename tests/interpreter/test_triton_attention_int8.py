"""The portable attention kernel in 8-bit integers, in Triton's interpreter, against its definition in float64."""

from __future__ import annotations

from dataclasses import replace

import not_finite
import pytest
import torch

from psa_kernels import AttentionSpec, BlockLists, psa_attention
from psa_kernels.layout import make_layout
from psa_kernels.pyramid.triton import build_pyramid
from psa_kernels.quantise.triton import quantise_as_read
from psa_kernels.sparse import triton_int8

SPEC = AttentionSpec(block_query=64, block_key=16, thresholds=(0.2, 0.5, 0.8), precision="int8_qk")
CASES = {
    "levels": (SPEC, 0, 0, False, 1),
    "permuted, text, groups": (SPEC, 3, 5, True, 2),
    "no level 1, text after": (replace(SPEC, block_key=32, levels=(2, 8), thresholds=(0.5, 0.9)), 0, 7, False, 1),
    "tokens alone": (replace(SPEC, levels=(1,), thresholds=(0.7,)), 2, 0, True, 1),
    "mean of the rest": (replace(SPEC, rest="mean"), 0, 4, False, 1),
}


def inputs(tokens, group=1, head_dim=64):
    """q, k, v in float16, keys around a mean that is not 0 and whole multiples of 1/4, of which means are exact.

    Many of such multiples may lie in the middle of two integers at once, for some largest entries.
    """
    q, v = (1.5 * torch.randn(1, tokens, heads, head_dim) for heads in (2 * group, 2))
    k = torch.randint(-8, 9, (1, tokens, 2, head_dim)) / 4 + torch.randint(-2, 3, (head_dim,))
    return [x.half() for x in (q, k, v)]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def random_lists(spec, tokens, heads):
    blocks = -(-tokens // spec.block_query), -(-tokens // spec.block_key)
    levels = len(spec.levels)
    chosen = torch.randint(0, levels + 1, (1, heads, *blocks))
    chosen[..., 1] = 0
    return BlockLists.from_levels(chosen, levels)


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition_to_rounding(name):
    spec, before, after, permuted, group = CASES[name]
    # Rows of the finest level and of the text are a power of two, so that their mean and those of groups are exact: a
    # key in the middle of two integers falls to the same one here as in float64.
    tokens = spec.levels[0] * (128 - before - after)
    q, k, v = inputs(tokens + before + after, group)
    options = {"lists": random_lists(spec, tokens, 2 * group), "text_before": before, "text_after": after}
    options["permutation"] = torch.randperm(tokens) if permuted else None
    wide = [x.double() for x in (q, k, v)]
    native = replace(spec, precision="native")
    exact, defined = (psa_attention(*wide, which, implementation="reference", **options) for which in (native, spec))
    found, stats = psa_attention(q, k, v, spec, implementation="triton", return_stats=True, **options)
    assert stats.implementation == "triton-int8"
    portable = psa_attention(q, k, v, native, implementation="triton", **options)
    rounding = relative_error(defined, exact)
    assert relative_error(found, defined) <= 1.4 * relative_error(portable, exact) + 0.05 * rounding
    # Else the comparison could not tell integers from float16.
    assert rounding > 3 * relative_error(portable, exact)


def test_log_sum_exp():
    """That of the native kernel, but for the steps of integers."""
    from psa_kernels.sparse import triton as native

    spec, tokens, scale = replace(SPEC, precision="native"), 100, 0.125
    q, k, v = inputs(tokens + 8)
    layout = make_layout(tokens + 8, tokens + 8, 3, 5, None)
    lists, pyramid = random_lists(spec, tokens, 2), build_pyramid(k, v, layout, spec)
    expected, found = torch.full((2, 1, 2, tokens + 8), torch.nan)
    native.sparse_attention(q, pyramid, lists, layout, spec, scale, expected)
    integers = quantise_as_read(q, pyramid, layout, spec, scale)
    triton_int8.sparse_attention(q, pyramid, lists, layout, spec, scale, found, integers=integers)
    assert found[..., :3].isnan().all() and found[..., -5:].isnan().all()
    difference = (found - expected)[..., 3:-5].abs().max()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_is_neither_hidden_nor_spread(which, value):
    spec = replace(not_finite.make_spec("count"), precision="int8_qk")
    not_finite.check_output(which, value, spec, "triton", 3e-2, dtype=torch.float16, head_dim=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_dim": 32}, "head_dim=32"), ({"dtype": torch.float32}, "dtype torch.float32"), ({"scale": -1.0}, "scale")],
    ids=["head_dim", "dtype", "scale"],
)
def test_what_it_cannot_serve_it_names(changes, message):
    q, k, v = (x.to(changes.get("dtype", x.dtype)) for x in inputs(70, head_dim=changes.get("head_dim", 64)))
    with pytest.raises(ValueError, match=message):
        psa_attention(q, k, v, SPEC, implementation="triton", scale=changes.get("scale"))
