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

Arguments = list[Any]
Expand = Callable[[Arguments], Arguments]


class Runner:
    """Launches a compiled kernel on the current stream, given all its arguments.

    Args:
        usual: Triton's own way, which takes the arguments one by one.
        put: None, or what hands arguments in the launcher's own form over to it.
        expand: None where that form is the arguments' own, or what brings arguments into it.
        hooks: where those are kept who want to be told of launches.
    """

    __slots__ = ("_expand", "_hooks", "_put", "_usual")

    def __init__(
        self, usual: Callable[..., None], put: Callable[[Arguments], None] | None = None, expand: Expand | None = None,
        hooks: Any = None,
    ) -> None:  # fmt: skip
        self._usual, self._put, self._expand, self._hooks = usual, put, expand, hooks

    def __call__(self, arguments: Arguments) -> None:
        """Launch it. Descriptors are given as `PlacedRows`."""
        if self._put is None or _hooked(self._hooks):
            self._usual(*arguments)
        else:
            self._put(arguments if self._expand is None else self._expand(arguments))

    @property
    def short(self) -> Callable[[Arguments], None] | None:
        """What launches it with expanded arguments; None where that must go Triton's own way, this time or always."""
        return None if self._put is None or _hooked(self._hooks) else self._put

    def expanded(self, arguments: Arguments) -> Arguments:
        """Arguments as `short` takes them."""
        return arguments if self._expand is None else self._expand(arguments)


def runner(compiled: Any, grid: Sequence[int]) -> Runner:
    """What launches a compiled kernel on the current stream, given all its arguments.

    Args:
        compiled: what Triton returned of a launch. Descriptors are given as `PlacedRows`, of which the address alone
            differs from one launch to the next.
        grid: three numbers of programs.
    """
    usual = compiled[grid]
    launcher: Any = getattr(compiled, "run", None)
    if type(launcher).__module__ != "triton.backends.nvidia.driver" or not _is_plain(launcher):
        return Runner(usual)
    import triton
    from triton import knobs
    from triton.runtime import driver

    device, stream, launch = driver.active.get_current_device, driver.active.get_current_stream, launcher.launch
    function, metadata = compiled.function, compiled.packed_metadata
    settings = (function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    x, y, z = grid
    if triton.__version__.startswith(FIRST_ORDER):
        launch, expand = _with_kept_descriptors(launch)
        # No scratch memory; then what the hooks are told, and the hooks.
        between = (*settings, None, None, metadata, None, None, None)

        def put(arguments: Arguments) -> None:
            launch(x, y, z, stream(device()), *between, *arguments)

        return Runner(usual, put, expand, knobs.runtime)
    if triton.__version__.startswith(SECOND_ORDER) and hasattr(launcher, "arg_annotations"):
        after = (
            *settings, metadata, None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature
        )  # fmt: skip

        def put_described(arguments: Arguments) -> None:
            launch(x, y, z, stream(device()), *after, tuple(arguments))

        return Runner(usual, put_described, None, knobs.runtime)
    return Runner(usual)


def _with_kept_descriptors(
    launch: Callable[..., None],
) -> tuple[Callable[..., None], Expand | None]:
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

    def expand(arguments: Arguments) -> Arguments:
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
