"""Token orders: in which order the tokens of a video grid stand while attention works on blocks of them.

A block is a run of consecutive tokens, so an order is good when such a run is compact in the video. `hilbert` follows
a space-filling curve, the generalised Hilbert idea of Jakub Cerveny (https://github.com/jakubcerveny/gilbert): a box is
cut into a few smaller boxes, each filled from one corner to a neighbouring one, so that one ends where the next starts.

Root mean square distance, in tokens, of a run's tokens from their centre on a 21 x 45 x 80 grid:
    tokens in the run           8     64    128
    raster                    2.3   22.5   23.0
    tiles of 4 x 4 x 4        1.2    2.3    3.6
    hilbert                   1.0    2.3    2.9
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from psa_presets import TokenOrder

KEPT_ON_DEVICES = 4
ORDERS = ("hilbert", "tiles", "raster")

Triple = tuple[int, int, int]
Grid = Triple  # tokens along frames, height and width


def token_permutation(order: str, grid: Sequence[int], tile: Sequence[int] = (4, 4, 4)) -> torch.Tensor:
    """Return the order of a grid's tokens, deterministic, as a fresh int64 tensor [T*H*W] on the CPU.

    Entry i is the raster index (t*H*W + h*W + w) of the token that stands at position i of the new order.

    Args:
        order: `raster` (as the model has them), `tiles` (box after box) or `hilbert` (a space-filling curve).
        grid: tokens along time, height and width (after patching), each at least 1.
        tile: size of a box along time, height and width, for `tiles` only. Boxes at the far borders are smaller.

    Raises:
        ValueError: an unknown order, or a grid or tile that is not three positive integers.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
    grid = _triple("grid", grid)
    tile = _triple("tile", tile)
    # The cache holds a NumPy array, and callers get a copy, so no caller's inference mode or write can reach the cache.
    return torch.from_numpy(_permutation(order, grid, tile if order == "tiles" else (1, 1, 1)).copy())


@lru_cache(maxsize=KEPT_ON_DEVICES)
def permutation_on(order: TokenOrder, grid: Grid, device: torch.device) -> torch.Tensor | None:
    """The permutation of a layer's order on a device, None for raster. Do not write to it: the last few are cached."""
    if order.order == "raster":
        return None
    with torch.inference_mode(False):
        return token_permutation(order.order, grid, order.tile).to(device)


def _triple(name: str, value: Sequence[int]) -> Triple:
    try:
        sizes = tuple(operator.index(size) for size in value)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"{name}={value!r}: expected three positive integers (time, height, width)")
    return sizes


@lru_cache(maxsize=16)
def _permutation(order: str, grid: Triple, tile: Triple) -> np.ndarray:
    if order == "raster":
        return np.arange(np.prod(grid), dtype=np.int64)
    if order == "tiles":
        return _tiles(grid, tile)
    return np.ravel_multi_index(_curve_through(grid).T, grid).astype(np.int64)


def _tiles(grid: Triple, tile: Triple) -> np.ndarray:
    """Raster order inside each box; the boxes in a snake, so that consecutive boxes always share a face."""
    time, height, width = (np.arange(size) // min(edge, size) for size, edge in zip(grid, tile, strict=True))
    rows, columns = height[-1] + 1, width[-1] + 1
    time = time[:, None, None]
    height = height[None, :, None]
    # Every other layer of boxes is walked upwards and every other row of boxes leftwards.
    row = time * rows + np.where(time % 2 == 0, height, rows - 1 - height)
    rank = row * columns + np.where(row % 2 == 0, width, columns - 1 - width)
    return np.argsort(rank.ravel(), kind="stable").astype(np.int64)


def _curve_through(grid: Triple) -> np.ndarray:
    """Coordinates [N, 3] of a curve through the grid that starts at its origin and runs along its longest axis."""
    axes = sorted(range(3), key=lambda axis: -grid[axis])
    points = np.empty((int(np.prod(grid)), 3), dtype=np.int32)
    points[:, axes] = _crossing(tuple(grid[axis] for axis in axes))
    return points


@lru_cache(maxsize=128)
def _crossing(size: Triple) -> np.ndarray:
    """Coordinates [N, 3] of a curve that fills a box, from its origin to the other end of its first axis.

    Only the size matters, and halving soon meets the same few sizes again. So each size is worked out once and then
    placed (turned, mirrored, moved). No Python loop runs over tokens, and 75,600 of them take milliseconds.

    Every step goes to a neighbour, if parity allows it: on a checkerboard the ends of an even number of tokens have
    unlike colours. Where it does not, a step is diagonal within one plane: 0.7 % of the steps for 21 x 45 x 80, none
    for 16 x 32 x 32.
    """
    first, second, third = size
    if second < third:
        return _crossing((first, third, second))[:, [0, 2, 1]]
    if second == 1:
        return np.arange(first, dtype=np.int32)[:, None] * np.array([[1, 0, 0]], dtype=np.int32)
    if first == 1:
        return _crossing((second, first, third))[:, [1, 0, 2]]
    pieces: list[np.ndarray] = []
    end = (0, 0, 0)
    for low, high, along in _cut(size):
        if all(a < b for a, b in zip(low, high, strict=True)):
            pieces.append(_place(low, high, along, end))
            end = pieces[-1][-1].tolist()
    return np.concatenate(pieces)


def _place(low: Triple, high: Triple, along: int, before: Sequence[int]) -> np.ndarray:
    """The curve through the box [low, high) that starts at the corner nearest to `before` and runs along one axis."""
    axes = [along, *(axis for axis in range(3) if axis != along)]
    local = _crossing(tuple(high[axis] - low[axis] for axis in axes))
    points = np.empty_like(local)
    for column, axis in enumerate(axes):
        near, far = low[axis], high[axis] - 1
        if abs(before[axis] - near) <= abs(before[axis] - far):
            points[:, axis] = near + local[:, column]
        else:
            points[:, axis] = far - local[:, column]
    return points


def _cut(size: Triple) -> list[tuple[Triple, Triple, int]]:
    """Cut a box (third axis no longer than the second) into boxes (low, high, axis to run along), in visiting order.

    A long box is cut only across its first axis, and a flat one not through its third, so that pieces come near cubes.
    """
    a, b, c = size
    x, y, z = (_middle(length) for length in size)
    if 2 * a > 3 * b:
        return [((0, 0, 0), (x, b, c), 0), ((x, 0, 0), (a, b, c), 0)]
    if 3 * b > 4 * c:
        # up the near half, along the far side, down again
        return [((0, 0, 0), (x, y, c), 1), ((0, y, 0), (a, b, c), 0), ((x, 0, 0), (a, y, c), 1)]
    return [
        ((0, 0, 0), (x, y, z), 1),
        ((0, y, 0), (x, b, c), 2),
        ((0, 0, z), (a, y, c), 0),
        ((x, y, 0), (a, b, c), 2),
        ((x, 0, 0), (a, y, z), 1),
    ]


def _middle(length: int) -> int:
    """Where to cut: in the middle, at an even length if possible, because such curves need no diagonal step."""
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half
