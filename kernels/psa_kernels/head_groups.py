"""Groups of heads that are computed at a time, so that only the pyramids of one group exist at once."""

from __future__ import annotations

from itertools import pairwise

# What the pyramids of a group may take: so much of the memory of the whole output,
LARGEST_SHARE = 1.25
# or so many bytes, where that is more. With less work a launch, multiprocessors that are done first wait too long.
SMALL_PYRAMIDS = 1 << 30


def head_groups(heads: int, head_bytes: int, output_bytes: int) -> list[slice]:
    """Cut the heads into as few groups as the memory of their pyramids allows; sizes differ by one at most.

    Args:
        heads: number of heads of the keys.
        head_bytes: memory of the pyramids of keys and values of one head, of all batch items.
        output_bytes: memory of the output of all heads of the queries.

    Returns:
        The groups, larger ones first: smaller ones then fit into the memory that they leave.
    """
    bound = max(int(LARGEST_SHARE * output_bytes), SMALL_PYRAMIDS)
    most = max(1, min(heads, bound // head_bytes if head_bytes else heads))
    if most == heads:
        return [slice(0, heads)]
    groups = -(-heads // most)
    size, larger = divmod(heads, groups)
    starts = [index * size + min(index, larger) for index in range(groups + 1)]
    return [slice(start, end) for start, end in pairwise(starts)]
