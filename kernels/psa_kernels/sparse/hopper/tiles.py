"""What the warps of the kernel for Hopper agree on: tiles, boxes, rings of slots, and who attends what."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

TILE_M = gl.constexpr(128)
TILE_N = gl.constexpr(128)
# Bytes of a row that lie together in shared memory.
PANEL_BYTES = gl.constexpr(128)
# Items that are announced before they are begun.
TICKETS = gl.constexpr(2)


@gluon.constexpr_function
def log2_of(value):
    """Exact logarithm of a power of two."""
    return value.bit_length() - 1


@gluon.constexpr_function
def divide(a, b):
    return a // b


@gluon.constexpr_function
def panel_columns(head_dim, bits):
    """Columns of a row that lie together in shared memory, for numbers of so many bits."""
    return min(head_dim, PANEL_BYTES.value * 8 // bits)


@gluon.constexpr_function
def tile_layout(head_dim, bits, rank=2):
    """Layout in shared memory of a tile `[rows, head_dim]`; of rank 4: of a box `[1, 1, rows, columns of a panel]`."""
    width = panel_columns(head_dim, bits) * bits // 8
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


@gluon.jit
def item_at(item, items, heads, video_queries, GROUP: gl.constexpr, CAUSAL: gl.constexpr):
    """One of the program's items: head of all batch items, batch item, head, tile of queries."""
    query_tiles = gl.cdiv(video_queries, TILE_M)
    if CAUSAL:
        # The order of `causal.triton_steps.item_at`, which says why.
        left = (items - 1 - item).to(gl.uint32)
        pair = left // GROUP
        tiles = query_tiles.to(gl.uint32)
        run = pair // tiles
        place = (pair - run * tiles).to(gl.int32)
        head_index = (run * GROUP + left % GROUP).to(gl.int32)
        query_tile = gl.where(run % 2 == 0, place, query_tiles - 1 - place)
        batch = (head_index.to(gl.uint32) // heads.to(gl.uint32)).to(gl.int32)
        return head_index, batch, head_index - batch * heads, query_tile
    else:
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


@gluon.constexpr_function
def number_layout(warps):
    """Layout of a single number that all threads of some warps hold."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def write_number(numbers, index, value):
    numbers.index(index).store(gl.full([1], value, gl.int32, number_layout(1)))


@gluon.jit
def read_number(numbers, index, WARPS: gl.constexpr):
    return gl.max(numbers.index(index).load(number_layout(WARPS)), 0)


@gluon.jit
def announce_item(schedule, count):
    """Take the next item off the counter that all programs share, and tell the program's other warps.

    Programs that had cheap items take more of them. `count` is the number of items taken before.
    """
    tickets, full, empty, counter_ptr = schedule
    slot, phase = in_ring(count, TICKETS)
    mbarrier.wait(empty.index(slot), phase ^ 1)
    item = gl.atomic_add(counter_ptr, 1)
    write_number(tickets, slot, item)
    mbarrier.arrive(full.index(slot), count=1)
    return item


@gluon.jit
def announced_item(schedule, count, WARPS: gl.constexpr):
    """The item that was announced after `count` others."""
    tickets, full, empty, _ = schedule
    slot, phase = in_ring(count, TICKETS)
    mbarrier.wait(full.index(slot), phase)
    item = read_number(tickets, slot, WARPS)
    mbarrier.arrive(empty.index(slot), count=1)
    return item
