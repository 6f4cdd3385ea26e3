"""Kernels that are launched again and again: what does not change is looked at once.

At every launch Triton binds the arguments and looks up, by all of them, what it compiled: tens of microseconds of the
host, as long as a small call takes the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Shape = tuple[int, ...]

# Of each kernel. A pipeline calls it for few shapes: its layers are alike.
KEPT_LAUNCHES = 64


class Launch:
    """A kernel with its grid and all arguments but the tensors, whose dtypes, device and absences (None) are fixed too.

    Args:
        kernel: a function of `triton.jit` or `gluon.jit` whose arguments are tensors, then numbers, then constants.
        grid: numbers of programs.
        numbers: the arguments after the tensors.
        constants: those after them, by name, and Triton's own options.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], numbers: Sequence[float] = (), **constants: Any) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._constants = tuple(numbers), constants
        self._last: tuple = ()
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch it on the current stream.

        Args:
            tensors: what the kernel takes first: tensors, None, and descriptors of Gluon.
        """
        arguments = [_address(tensor) for tensor in tensors]
        # What was compiled for addresses at multiples of 16 bytes must not be given others.
        aligned = not any(address % 16 for address in arguments if type(address) is int)
        if aligned and self._compiled is not None:
            self._compiled(*arguments, *self._last)
            return
        found = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if aligned and hasattr(found, "function"):  # Triton's interpreter compiles nothing
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._last = (*self._numbers, *(self._constants[name] for name in names))
            self._compiled = found[self._grid]

    @property
    def is_compiled(self) -> bool:
        """Whether it was launched before, so that of descriptors only the addresses count."""
        return self._compiled is not None


def _address(tensor: Any) -> Any:
    """Where a tensor begins, 0 where there is none; a descriptor is itself."""
    if tensor is None:
        return 0
    address = getattr(tensor, "data_ptr", None)
    return tensor if address is None else address()
