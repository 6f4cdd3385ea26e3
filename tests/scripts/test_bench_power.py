"""The parts of the power benchmark that need no GPU."""

from __future__ import annotations

import math

import torch
from bench_power import near
from gpu_power import PowerMeter

from psa_kernels import BlockLists


def test_near_lists_are_as_long_and_lie_in_the_first_quarter() -> None:
    shares = torch.tensor([0] * 3 + [1] * 4 + [2] * 9)
    level = torch.stack([shares[torch.randperm(16)] for _ in range(12)]).view(1, 3, 4, 16)
    lists = BlockLists.from_levels(level, 2)
    found = near(lists)
    assert torch.equal(found.counts, lists.counts) and found.ids.shape == lists.ids.shape
    assert found.ids.max() < 4 <= lists.ids.max()
    for part in (found.ids[..., :3], found.ids[..., 3:7]):
        assert (part.diff(dim=-1) >= 0).all()


def test_a_meter_averages_what_it_read_between_two_times() -> None:
    meter = PowerMeter([(1.0, 600.0, 1500.0), (2.0, 700.0, 1400.0), (3.0, 710.0, 1300.0)])
    assert meter.between(1.5, 3.0) == (705.0, 1350.0)
    assert all(math.isnan(figure) for figure in meter.between(4.0, 5.0))
