"""How a compiled kernel is put on a stream: by what Triton's own runner calls in the end, where that is known.

The runner asks for hooks and scratch memory, and describes the launch to the hooks, at every launch. Where there are
neither, only the stream is left to ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Releases whose launcher takes the arguments in the order below; any other goes the way of Triton's runner.
FIRST_ORDER, SECOND_ORDER = ("3.6.",), ("3.7.", "3.8.", "3.9.")


def runner(compiled: Any, grid: Sequence[int]) -> Callable[[list[Any]], None]:
    """What launches a compiled kernel on the current stream, given all its arguments.

    Args:
        compiled: what Triton returned of a launch.
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
        # No scratch memory; then what the hooks are told, and the hooks.
        between = (*settings, None, None, metadata, None, None, None)

        def run(arguments: list[Any]) -> None:
            if _hooked(hooks):
                usual(*arguments)
            else:
                launch(x, y, z, stream(device()), *between, *arguments)

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
