"""Token orders: permutations for any grid, a curve without jumps, boxes that are boxes."""

import itertools
import time

import pytest
import torch

from psa_diffusers.patch.token_order import ORDERS, token_permutation

VIDEO_GRIDS = [(21, 45, 80), (21, 30, 52), (31, 44, 80), (9, 24, 24)]
ODD_GRIDS = [(1, 1, 1), (1, 1, 17), (1, 19, 1), (23, 1, 1), (1, 37, 53), (2, 3, 5), (7, 11, 13), (3, 61, 2), (2, 2, 97)]


def coordinates(order, grid, tile=(4, 4, 4)):
    """[N, 3] coordinates of the tokens in the order's sequence."""
    return torch.stack(torch.unravel_index(token_permutation(order, grid, tile), grid), dim=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", VIDEO_GRIDS + ODD_GRIDS, ids=str)
def test_every_token_occurs_once(order, grid):
    permutation = token_permutation(order, grid)
    assert permutation.dtype == torch.int64 and permutation.device.type == "cpu"
    assert torch.equal(permutation.sort().values, torch.arange(grid[0] * grid[1] * grid[2]))


@pytest.mark.parametrize("grid", VIDEO_GRIDS + ODD_GRIDS, ids=str)
def test_hilbert_steps_to_neighbours(grid):
    steps = coordinates("hilbert", grid).diff(dim=0).abs()
    lengths = steps.sum(dim=1)
    assert (lengths <= 2).all() and (steps <= 1).all(), "a jump"
    assert (lengths == 2).sum() <= max(1, 0.03 * len(lengths)), "too many diagonal steps"


def test_hilbert_steps_to_neighbours_in_all_small_grids():
    for grid in itertools.product(range(1, 8), repeat=3):
        sequence = coordinates("hilbert", grid)
        assert len(sequence.unique(dim=0)) == grid[0] * grid[1] * grid[2], grid
        steps = sequence.diff(dim=0).abs()
        assert (steps.sum(dim=1) <= 2).all() and (steps <= 1).all(), grid


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 32, 32), (1, 16, 16), (1, 45, 80)], ids=str)
def test_hilbert_has_no_diagonal_step_where_parity_allows(grid):
    assert (coordinates("hilbert", grid).diff(dim=0).abs().sum(dim=1) == 1).all()


@pytest.mark.parametrize("size", [8, 64])
def test_aligned_runs_of_the_hilbert_curve_are_cubes_in_a_cube(size):
    edge = round(size ** (1 / 3))
    runs = coordinates("hilbert", (16, 16, 16)).view(-1, size, 3)
    assert ((runs.amax(dim=1) - runs.amin(dim=1)) == edge - 1).all()


@pytest.mark.parametrize("grid", VIDEO_GRIDS, ids=str)
@pytest.mark.parametrize("order", ["hilbert", "tiles"])
def test_blocks_are_several_times_more_compact_than_in_raster_order(order, grid):
    def radius(name):
        sequence = coordinates(name, grid).double()
        runs = sequence[: len(sequence) // 64 * 64].view(-1, 64, 3)
        return (runs - runs.mean(dim=1, keepdim=True)).norm(dim=2).pow(2).mean().sqrt()

    assert radius(order) < 0.5 * radius("raster")


@pytest.mark.parametrize("tile", [(4, 4, 4), (2, 8, 8), (1, 3, 5), (50, 50, 50)], ids=str)
@pytest.mark.parametrize("grid", [(9, 24, 24), (5, 7, 11), (1, 10, 13), (8, 8, 8)], ids=str)
def test_tiles_are_boxes_and_neighbouring_boxes_touch(grid, tile):
    sequence = coordinates("tiles", grid, tile)
    box = sequence // torch.tensor(tile)
    boxes, runs = box.unique_consecutive(dim=0, return_counts=True)
    assert len(boxes) == len(boxes.unique(dim=0)), "a box is left before it is complete"
    sizes = [[min(t, g - b * t) for b, t, g in zip(corner, tile, grid, strict=True)] for corner in boxes.tolist()]
    assert runs.tolist() == [a * b * c for a, b, c in sizes]
    assert (boxes.diff(dim=0).abs().sum(dim=1) == 1).all(), "consecutive boxes do not share a face"


def test_tokens_inside_a_tile_are_in_raster_order():
    permutation = token_permutation("tiles", (4, 6, 6), (2, 3, 3)).view(-1, 18)
    assert (permutation.diff(dim=1) > 0).all()


def test_raster_is_the_identity():
    assert torch.equal(token_permutation("raster", (3, 4, 5)), torch.arange(60))


def test_the_result_can_be_written_without_spoiling_the_next():
    first = token_permutation("hilbert", (2, 3, 4))
    expected = first.clone()
    first.zero_()
    assert torch.equal(token_permutation("hilbert", (2, 3, 4)), expected)


def test_first_use_in_inference_mode_leaves_a_usable_tensor_for_training():
    with torch.inference_mode():
        token_permutation("hilbert", (2, 5, 4))
    values = torch.randn(40, requires_grad=True)
    values[token_permutation("hilbert", (2, 5, 4))].sum().backward()
    assert values.grad is not None


def test_a_large_grid_takes_well_under_a_second():
    start = time.perf_counter()
    token_permutation("hilbert", (23, 47, 82))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("grid", [(0, 2, 2), (2, 2), (1, 2, 3, 4), (2.0, 2, 2), "abc", None, (2, -1, 2)], ids=repr)
def test_a_bad_grid_is_named(grid):
    with pytest.raises(ValueError) as caught:
        token_permutation("hilbert", grid)
    assert f"grid={grid!r}" in str(caught.value) and "three positive integers" in str(caught.value)


def test_a_bad_tile_or_order_is_named():
    with pytest.raises(ValueError, match=r"tile=\(4, 4\): expected three positive integers"):
        token_permutation("tiles", (4, 4, 4), (4, 4))
    with pytest.raises(ValueError, match="order='hilbertt': expected one of hilbert, tiles, raster"):
        token_permutation("hilbertt", (4, 4, 4))
