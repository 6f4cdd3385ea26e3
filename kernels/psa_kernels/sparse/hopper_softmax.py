"""Exponentials and row sums of the kernel for Hopper."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 2^f for f from -1/2 to 1/2, lowest power first, with a relative error of at most 7.5e-5: a 25th of bfloat16's own.
# The coefficients minimise the largest relative error (Lawson's algorithm).
COEFFICIENTS = ("0f3F7FFB49", "0f3F31798D", "0f3E786F0D", "0f3D61FBB0")


@gluon.constexpr_function
def exp2_code(share):
    """PTX for `share` entries of a thread: 2^x of the last by a polynomial, of the others by the special unit.

    The polynomial's argument is what the nearest integer leaves; adding 1.5 * 2^23 rounds to it and leaves it in the
    lowest bits, from where it is shifted into the exponent. Beyond -126 and 126, results stay at 2^-126 and 2^126, and
    NaN becomes the largest number, so that sums show both.
    """
    lines = [f"ex2.approx.ftz.f32 ${i}, ${share + i};" for i in range(share - 1)]
    c0, c1, c2, c3 = COEFFICIENTS
    return "\n".join([
        "{ .reg .f32 x, n, f, p; .reg .b32 a, b;",
        *lines,
        f"max.NaN.f32 x, ${2 * share - 1}, 0fC2FC0000;",
        "min.NaN.f32 x, x, 0f42FC0000;",
        "add.rn.f32 n, x, 0f4B400000;",
        "sub.rn.f32 f, n, 0f4B400000;",
        "sub.rn.f32 f, x, f;",
        f"fma.rn.f32 p, f, {c3}, {c2};",
        f"fma.rn.f32 p, p, f, {c1};",
        f"fma.rn.f32 p, p, f, {c0};",
        "mov.b32 a, n;",
        "mov.b32 b, p;",
        "shl.b32 a, a, 23;",
        "add.s32 b, b, a;",
        f"mov.b32 ${share - 1}, b; }}",
    ])  # fmt: skip


@gluon.constexpr_function
def exp2_constraints(share):
    return ",".join(["=f"] * share + ["f"] * share)


@gluon.jit
def exp2(x, SHARE: gl.constexpr):
    """2^x; of one entry in `SHARE` by a polynomial, which relieves the special function unit; of none where it is 0.

    With head_dim 64 that unit has as much to do for a tile as the tensor cores.
    """
    if SHARE > 0:
        return gl.inline_asm_elementwise(
            exp2_code(SHARE), exp2_constraints(SHARE), [x], dtype=gl.float32, is_pure=True, pack=SHARE
        )
    else:
        return gl.exp2(x)


@gluon.jit
def row_sums(weights, LATE: gl.constexpr):
    """Sums over the columns of each row; if `LATE`, one for each of the four threads that have parts of it.

    In an accumulator thread t of every four has columns 8 j + 2 t + e. The rest of the sum waits for the last tile,
    which spares the exchange between threads in all others.
    """
    if LATE:
        parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
        return gl.sum(gl.sum(parts, 3), 1)
    else:
        return gl.sum(weights, 1)


@gluon.jit
def per_row(factors, sums):
    """Factors of the rows in the shape and layout of `row_sums`."""
    if len(sums.shape) == 1:
        return factors
    else:
        return gl.convert_layout(factors, gl.SliceLayout(1, sums.type.layout))[:, None]
