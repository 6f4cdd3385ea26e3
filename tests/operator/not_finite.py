"""What every implementation owes to inputs with NaN, infinite and overflowing values: nothing is hidden or invented.

`test_not_finite.py` and the tests in `interpreter/` run these.
"""

from __future__ import annotations

import itertools
import math

import torch

from psa_kernels import AttentionSpec, psa_attention, select_blocks

TOKENS, HEADS, BAD_TOKEN, BAD_HEAD = 203, 2, 77, 1
VALUES = {"nan": math.nan, "inf": math.inf, "minus-inf": -math.inf, "huge": None}
CASES = list(itertools.product(("q", "k", "v"), VALUES))
SPECS = {
    "count": {},
    "mass, similarity, rest": {
        "rule": "mass",
        "thresholds": (0.4, 0.7, 0.9),
        "similarity": (0.01, 0.0),
        "rest": "mean",
    },
    "budget": {"rule": "budget", "density": 0.4},
}


def make_spec(name: str, block_key: int = 32) -> AttentionSpec:
    return AttentionSpec(**{"block_query": 64, "block_key": block_key, **SPECS[name]})


def spoiled_inputs(which, value, *, device="cpu", dtype=torch.float32, tokens=TOKENS, head_dim=16):
    """Random q, k, v, and the same with one bad token in one head."""
    sound = [torch.randn(1, tokens, HEADS, head_dim, device=device, dtype=torch.float32).to(dtype) for _ in range(3)]
    spoiled = [x.clone() for x in sound]
    # The largest value of the dtype: products with it, and sums of it, run over.
    # One of them a row, for sums of several run over to either side in any order, as those of dense attention do.
    bad, places = (torch.finfo(dtype).max, slice(3, 4)) if VALUES[value] is None else (VALUES[value], slice(0, None, 3))
    spoiled["qkv".index(which)][0, BAD_TOKEN, BAD_HEAD, places] = bad
    return sound, spoiled


def check_output(which, value, spec, implementation, tolerance, **options):
    """With the lists of sound inputs, so that what each row reads is known.

    Against float64: what must not be finite is not, what is finite is right, and the other head is untouched. More rows
    than that may be lost in the bad head: the processor sees it and computes dense attention.
    """
    sound, spoiled = spoiled_inputs(which, value, **options)
    lists = select_blocks(*sound[:2], spec, v=sound[2], implementation=implementation)
    out = psa_attention(*spoiled, spec, lists=lists, implementation=implementation)
    wide = [x.double() for x in spoiled]
    expected = psa_attention(*wide, spec, lists=lists, implementation="reference")
    finite = out.isfinite()
    assert not (finite & ~expected.isfinite()).any(), "a value that is not finite was hidden"
    allowed = tolerance * (1 + expected.abs())
    if value == "huge" and which != "v" and sound[0].dtype == torch.float16:
        allowed += rounding_of_logits(*wide, spec, lists)
    wrong = finite & ((out.double() - expected).abs() > allowed)
    assert not wrong.any(), f"{int(wrong.sum())} finite values are wrong"
    other = 1 - BAD_HEAD
    assert finite[:, :, other].all()
    if value == "nan" and which == "q":  # a key may have been skipped
        assert not finite[:, :, BAD_HEAD].all()


def rounding_of_logits(q, k, v, spec, lists):
    """By how much each output may be off because float32 rounds logits: `[B, N, H, D]`.

    The largest value of float16 makes logits of tens of thousands, which float32 knows to a few thousandths. That
    counts where two of them lie close: to first order an output moves by the sum over the rows that it reads of the
    weight, times the change of the logit, times how far the row's value lies from the output.
    """
    logits = (q.abs() * k.abs().amax(1, keepdim=True)).amax(-1, keepdim=True) * q.shape[-1] ** -0.5
    change = 2 * torch.finfo(torch.float32).eps * logits
    # By Jensen at most their standard deviation under the weights. Means of squares exceed the squares of means.
    mean, square = (psa_attention(q, k, x, spec, lists=lists, implementation="reference") for x in (v, v.square()))
    return change * (square - mean.square()).clamp(min=0).sqrt()


def check_lists(which, value, spec, implementation, **options):
    """Lists made of spoiled inputs name each block once, so that no kernel reads out of bounds."""
    _, spoiled = spoiled_inputs(which, value, **options)
    lists = select_blocks(*spoiled[:2], spec, v=spoiled[2], implementation=implementation)
    ids = lists.ids.long().sort(-1).values
    assert (ids >= 0).all() and (ids < lists.key_blocks).all() and (ids.diff(dim=-1) > 0).all()
    assert (lists.counts >= 0).all() and (lists.counts.sum(-1) <= lists.ids.shape[-1]).all()
    out = psa_attention(*spoiled, spec, lists=lists, implementation=implementation)
    assert out.shape == spoiled[0].shape
    assert out[:, :, 1 - BAD_HEAD].isfinite().all()
