"""What the warps of the kernel for Hopper agree on: tiles, boxes, rings of slots, and who attends what."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TILE_M = gl.constexpr(128)
TILE_N = gl.constexpr(128)
# Columns of a row that lie together in shared memory, 128 bytes in 16-bit numbers.
PANEL = gl.constexpr(64)


@gluon.constexpr_function
def log2_of(value):
    """Exact logarithm of a power of two."""
    return value.bit_length() - 1


@gluon.constexpr_function
def divide(a, b):
    return a // b


@gluon.constexpr_function
def box_layout(rows):
    """Layout in shared memory of a box `[1, 1, rows, PANEL]`; it does not depend on the number of rows."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@gluon.jit
def item_at(item, heads, video_queries):
    """One of the program's items: head of all batch items, batch item, head, tile of queries."""
    query_tiles = gl.cdiv(video_queries, TILE_M)
    head_index = item // query_tiles
    return head_index, head_index // heads, head_index % heads, item % query_tiles


@gluon.jit
def list_row(head_index, query_tile, video_queries, BLOCK_QUERY: gl.constexpr):
    """Which list serves a tile of queries."""
    row = head_index.to(gl.int64) * gl.cdiv(video_queries, BLOCK_QUERY)
    return row + query_tile // divide(BLOCK_QUERY, TILE_M)


@gluon.jit
def in_ring(count, SLOTS: gl.constexpr):
    """Which slot of a ring comes after `count` uses, and the phase of its barriers."""
    count = count.to(gl.uint32)
    return (count % SLOTS).to(gl.int32), ((count // SLOTS) & 1).to(gl.int32)
