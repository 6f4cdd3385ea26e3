"""How a compiled kernel is put on a stream: by what Triton's own runner calls in the end, where that is known.

The runner asks for hooks and scratch memory, and describes the launch to the hooks, at every launch. Where there are
neither, only the stream is left to ask for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

# Releases whose launcher takes the arguments in the order below; any other goes the way of Triton's runner.
FIRST_ORDER, SECOND_ORDER = ("3.6.",), ("3.7.", "3.8.", "3.9.")
# Of one launch. Memory is given out at the same addresses again and again.
KEPT_DESCRIPTORS = 1024


def runner(compiled: Any, grid: Sequence[int]) -> Callable[[list[Any]], None]:
    """What launches a compiled kernel on the current stream, given all its arguments.

    Args:
        compiled: what Triton returned of a launch. Descriptors are given as `PlacedRows`, of which the address alone
            differs from one launch to the next.
        grid: three numbers of programs.
    """
    usual = compiled[grid]
    launcher: Any = getattr(compiled, "run", None)
    if type(launcher).__module__ != "triton.backends.nvidia.driver" or not _is_plain(launcher):
        return lambda arguments: usual(*arguments)
    import triton
    from triton import knobs
    from triton.runtime import driver

    device, stream, hooks, launch = (
        driver.active.get_current_device, driver.active.get_current_stream, knobs.runtime, launcher.launch
    )  # fmt: skip
    function, metadata = compiled.function, compiled.packed_metadata
    settings = (function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    x, y, z = grid
    if triton.__version__.startswith(FIRST_ORDER):
        launch, expand = _with_kept_descriptors(launch)
        # No scratch memory; then what the hooks are told, and the hooks.
        between = (*settings, None, None, metadata, None, None, None)

        def run(arguments: list[Any]) -> None:
            if _hooked(hooks):
                usual(*arguments)
            else:
                launch(x, y, z, stream(device()), *between, *(arguments if expand is None else expand(arguments)))

        return run
    if triton.__version__.startswith(SECOND_ORDER) and hasattr(launcher, "arg_annotations"):
        after = (
            *settings, metadata, None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature
        )  # fmt: skip

        def run_described(arguments: list[Any]) -> None:
            if _hooked(hooks):
                usual(*arguments)
            else:
                launch(x, y, z, stream(device()), *after, tuple(arguments))

        return run_described
    return lambda arguments: usual(*arguments)


def _with_kept_descriptors(
    launch: Callable[..., None],
) -> tuple[Callable[..., None], Callable[[list[Any]], list[Any]] | None]:
    """The launcher without what makes descriptors, and that: it makes none twice.

    One follows from its place and address, and is never changed. Triton wraps the launcher of a kernel that takes
    descriptors in a function that makes them at each launch. It is replaced where what it refers to is as known; else
    the second is None.
    """
    if not inspect.isfunction(launch):
        return launch, None
    found = inspect.getclosurevars(launch).nonlocals
    if found.keys() != {"launcher", "tensordesc_indices", "tensordesc_meta"} or None in found["tensordesc_meta"]:
        return launch, None
    from triton.backends.nvidia.driver import make_tensordesc_arg

    # From the last place to the first: each descriptor becomes several arguments.
    places = sorted(found["tensordesc_indices"], reverse=True)
    described = list(zip(places, reversed(found["tensordesc_meta"]), strict=True))
    made: dict[tuple[int, int], list[Any]] = {}

    def expand(arguments: list[Any]) -> list[Any]:
        expanded = arguments[:]
        for place, metadata in described:
            rows = arguments[place]
            key = place, rows.address
            descriptor = made.get(key)
            if descriptor is None:
                if len(made) >= KEPT_DESCRIPTORS:
                    made.clear()
                descriptor = made[key] = make_tensordesc_arg(rows, metadata)
            expanded[place : place + 1] = descriptor
        return expanded

    return found["launcher"], expand


def _is_plain(launcher: Any) -> bool:
    """Whether a launcher needs no memory beside the arguments, and adds none to them."""
    sizes = (getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile"))
    return all(size == 0 for size in sizes) and not getattr(launcher, "gsan_enabled", False)


def _hooked(hooks: Any) -> bool:
    """Whether someone, such as a profiler, wants to be told of launches."""
    for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
