"""ChronoEdit's temporal reasoning: the video of a run becomes two frames midway."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers import apply_psa
from psa_testing.families import CASES
from psa_testing.tiny_families import assert_equal_to_rounding, preset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cut", [1, 3])
def test_lists_of_the_whole_video_do_not_serve_its_two_frames(cut):
    """Where a step would use the lists of the step before it."""
    case, pipe = CASES["chronoedit"], CASES["chronoedit"].make()
    inputs = {"num_temporal_reasoning_steps": cut}
    stock = case.run(pipe, **inputs)
    assert stock.shape[2] == 2
    with apply_psa(pipe, preset(dense_steps=0.0, refresh=2, thresholds=[1.0] * 3), strict=True):
        assert_equal_to_rounding(case.run(pipe, **inputs), stock)
    with apply_psa(pipe, preset(dense_steps=0.0, refresh=2), strict=True) as psa:
        sparse = case.run(pipe, **inputs)
        assert sparse.isfinite().all() and torch.equal(case.run(pipe, **inputs), sparse)
    # Of 6 and of 4 query blocks, which keep other shares.
    before, after = psa.stats().density[0][0], psa.stats().density[-1][0]
    assert psa.stats().steps == 4 and before != after
    assert [row[0] for row in psa.stats().density] == [before] * cut + [after] * (4 - cut)
