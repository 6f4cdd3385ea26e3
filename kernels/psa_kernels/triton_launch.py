"""Kernels that are launched again and again: what does not change is looked at once.

At every launch Triton binds the arguments and looks up, by all of them, what it compiled: tens of microseconds of the
host, as long as a small call takes the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

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
            tensors: what the kernel takes first: tensors, None, and `Rows`.
        """
        arguments: list[Any] = []
        addresses = 0
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                address = tensor.data_ptr()
                addresses |= address
                arguments.append(address)
            else:
                arguments.append(0 if tensor is None else tensor)
        # What was compiled for addresses at multiples of 16 bytes must not be given others.
        if self._compiled is not None and not addresses & 15:
            self._compiled(*arguments, *self._last)
            return
        described = [tensor.descriptor() if isinstance(tensor, Rows) else tensor for tensor in tensors]
        found = self._kernel[self._grid](*described, *self._numbers, **self._constants)
        if not addresses & 15 and hasattr(found, "function"):  # Triton's interpreter compiles nothing
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._last = (*self._numbers, *(self._constants[name] for name in names))
            self._compiled = found[self._grid]


class Rows(ABC):
    """Rows of a tensor for a kernel that takes a descriptor of them; what a launch reads of one.

    Attributes:
        shape, strides: of the rows, in elements.
        padding: what lies past their ends.
        round_f32_to_tf32: whether float32 is rounded on its way; read by Triton 3.7 and newer.
    """

    __slots__ = ("_address", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, address: int, shape: Shape, strides: Shape) -> None:
        self._address, self.shape, self.strides = address, shape, strides

    @property
    def base(self) -> Rows:
        """What tells the address."""
        return self

    def data_ptr(self) -> int:
        """The address of the first row."""
        return self._address

    @abstractmethod
    def descriptor(self) -> Any:
        """The descriptor, with all that it checks, by which Triton compiles the kernel."""
