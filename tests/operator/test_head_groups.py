"""Into which groups heads are cut, that the groups keep their bound, and where their lists begin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_kernels.head_groups import LARGEST_SHARE, SMALL_PYRAMIDS, head_groups
from psa_kernels.lists import BlockLists


def sizes(heads, tokens, head_dim, factors):
    """Sizes of the groups of a call in 16-bit numbers whose pyramid has these factors, queries as many as keys."""
    output = tokens * heads * head_dim * 2
    head_bytes = 2 * sum(-(-tokens // factor) for factor in factors) * head_dim * 2
    return [group.stop - group.start for group in head_groups(heads, head_bytes, output)]


def test_large_calls_are_cut_and_small_ones_stay_whole():
    # Wan2.1-14B at 720p, in raster order and with gathered tokens; Wan2.1-1.3B at 480p; CogVideoX-5B; the reference.
    assert sizes(40, 75_600, 128, (2, 4)) == [20, 20]
    assert sizes(40, 75_600, 128, (1, 2, 4)) == [14, 13, 13]
    assert sizes(12, 32_760, 128, (1, 2, 4)) == [12]
    assert sizes(48, 17_550, 64, (1, 2, 4)) == [48]
    assert sizes(40, 75_600, 128, ()) == [40]


@given(st.integers(1, 64), st.integers(0, 2**34), st.integers(0, 2**34))
def test_groups_are_few_and_as_large_as_the_bound_allows(heads, head_bytes, output_bytes):
    groups = head_groups(heads, head_bytes, output_bytes)
    assert [head for group in groups for head in range(heads)[group]] == list(range(heads))
    found = [group.stop - group.start for group in groups]
    assert found == sorted(found, reverse=True) and found[0] - found[-1] <= 1
    bound = max(LARGEST_SHARE * output_bytes, SMALL_PYRAMIDS)
    assert found[0] == 1 or found[0] * head_bytes <= bound
    # One group less would hold a larger one.
    assert len(groups) == 1 or -(-heads // (len(groups) - 1)) * head_bytes > bound - 1


@pytest.mark.parametrize("width", [7, 8])
def test_the_lists_of_a_group_begin_where_kernels_expect_tensors(width):
    """At multiples of 16 bytes: for others Triton would compile the kernels once more."""
    levels = torch.randint(4, (2, 5, 3, 9))
    lists = BlockLists.from_levels(levels, 3, width)
    whole = BlockLists.from_levels(levels, 3)
    for part in [(slice(b, b + 1), slice(h, end)) for b in range(2) for h in range(5) for end in range(h + 1, 6)]:
        found = lists[part]
        assert all(x.data_ptr() % 16 == 0 and x.is_contiguous() for x in (found.ids, found.counts))
        assert torch.equal(found.ids, lists.ids[part]) and torch.equal(found.counts, lists.counts[part])
        assert torch.equal(whole[part].levels(), levels[part])
    assert lists[:1].ids.data_ptr() == lists.ids.data_ptr()  # no copy where none is needed
