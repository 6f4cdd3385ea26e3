"""What the warpgroups of the kernel for Hopper do to the rows of a tile of scores."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def with_biases(scores, biases, factors):
    """Scores before they are multiplied by the factors of their rows, with the biases that columns have after that."""
    return scores + biases[None, :] * (1.0 / factors)[:, None]


@gluon.jit
def up_to_diagonal(scores, HALF: gl.constexpr):
    """Scores of a tile on the diagonal, -inf for keys that are later than the query; of half of its queries."""
    ROWS: gl.constexpr = scores.shape[0]
    row = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores.type.layout))
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where(column[None, :] <= row[:, None], scores, -float("inf"))


@gluon.jit
def row_sums(weights):
    """Sums of each row, one for each of the four threads that have parts of it: `[rows, 4]`.

    In an accumulator thread t of every four has columns 8 j + 2 t + e. The rest of the sum waits for the last tile,
    which spares the exchange between threads in all others.
    """
    parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def per_row(factors, sums):
    """Factors of the rows, in the layout of `row_sums`: `[rows, 1]`."""
    return gl.convert_layout(factors, gl.SliceLayout(1, sums.type.layout))[:, None]
