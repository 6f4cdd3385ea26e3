"""How the programs of the kernel for Hopper keep in step, so that they find each other's rows in the cache.

All programs walk through the keys and values of a head in the same order, each for queries of its own. Where a head has
more rows than the cache holds, a row is read from memory once for all of them if they are at about the same place, and
again for those that are far behind. So a program that is ahead waits before its next item. That costs little time,
because the others catch up sooner, and the power that memory does not draw goes to the multiprocessors.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Programs that the others do not wait for: one that is always late would hold up all.
STRAGGLERS = gl.constexpr(4)
# Looks at the counter before a program gives up for the rest of the launch; some milliseconds. Where something else
# holds a multiprocessor, its program may not have begun.
MAX_LOOKS = gl.constexpr(1 << 14)


@gluon.jit
def report_nearly_done(step_ptr):
    """Tell the other programs that this one has an item nearly behind it."""
    gl.atomic_add(step_ptr, 1, sem="relaxed")


@gluon.jit
def wait_for_others(step_ptr, done, items, patience):
    """Wait until the others have nearly done as many items as this program has done.

    Args:
        step_ptr: int32: items nearly done, of all programs.
        done: items of this program before the next one.
        items: items of all programs. Those that programs may hold, waiting, are not waited for.
        patience: how often to look at most.

    Returns:
        `patience`, or 0 if that was not enough.
    """
    programs = gl.num_programs(0)
    goal = gl.minimum(done * programs - STRAGGLERS, items - 2 * programs)
    looks = patience
    while (looks > 0) & (gl.load(step_ptr, volatile=True) < goal):
        gl.inline_asm_elementwise(
            "nanosleep.u32 400; mov.u32 $0, $1;", "=r,r", [looks], dtype=gl.int32, is_pure=False, pack=1
        )
        looks -= 1
    return gl.where(looks > 0, patience, 0)
