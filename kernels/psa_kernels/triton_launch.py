"""Kernels that are launched again and again: what does not change is looked at once.

At every launch Triton binds the arguments and looks up, by all of them, what it compiled: tens of microseconds of the
host, as long as a small call takes the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from psa_kernels.triton_runner import Runner, runner

Shape = tuple[int, ...]

OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
# Of each kernel. A pipeline calls it for few shapes: its layers are alike.
KEPT_LAUNCHES = 64
# Of one launch. Memory is given out at the same addresses again and again.
KEPT_ROWS = 1024


class Launch:
    """A kernel with its grid and all arguments but the tensors, whose dtypes, device and absences (None) are fixed too.

    Args:
        kernel: a function of `triton.jit` or `gluon.jit` whose arguments are tensors, then numbers, then constants.
        grid: numbers of programs.
        numbers: the arguments after the tensors.
        constants: those after them, by name, and Triton's own options. `ALIGNED` becomes False for a call with a tensor
            that does not start at a multiple of 16 bytes.

    Raises:
        TypeError: the kernel has no argument of the name of a constant, which Triton's interpreter would not notice.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], numbers: Sequence[float] = (), **constants: Any) -> None:
        self._kernel, self._grid = kernel, (*grid, 1, 1)[:3]
        self._numbers, self._constants = tuple(numbers), constants
        unknown = constants.keys() - OPTIONS - set(kernel.arg_names)
        if unknown:
            raise TypeError(f"{kernel.__name__} has no constants {', '.join(sorted(unknown))}")
        # Of a prepared launch: all arguments, with gaps for the addresses, those after the gaps, and where tensors and
        # rows stand.
        self._arguments: list[Any] = []
        self._rest: list[Any] = []
        self._tensors: list[int] = []
        self._rows: list[int] = []
        self._like: dict[int, tuple[Shape, Shape]] = {}
        # What stands between the first and the last rows, as given and as the launcher takes it, by their addresses.
        self._kept: dict[tuple[int, ...], tuple[list[Any], list[Any]]] = {}
        self._run: Runner | None = None

    def __call__(self, *tensors: Any) -> None:
        """Launch it on the current stream.

        Args:
            tensors: what the kernel takes first: tensors, None, and `Rows`, at every call the same kinds in the same
                places, and `Rows` of the same shapes and strides.
        """
        if self._run is not None:
            arguments, addresses = self._arguments[:], 0
            for place in self._tensors:
                arguments[place] = address = tensors[place].data_ptr()
                addresses |= address
            for place in self._rows:
                arguments[place] = tensors[place]
            # What was compiled for addresses at multiples of 16 bytes must not be given others.
            if not addresses & 15:
                self._run(arguments)
                return
        described = [tensor.descriptor() if isinstance(tensor, Rows) else tensor for tensor in tensors]
        constants = self._constants
        if constants.get("ALIGNED"):
            aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors if isinstance(tensor, torch.Tensor))
            constants = constants | {"ALIGNED": aligned}
        found = self._kernel[self._grid](*described, *self._numbers, **constants)
        if hasattr(found, "function"):  # Triton's interpreter compiles nothing
            self._keep(found, tensors)

    def with_more(self, kernel: Any, *numbers: float) -> Launch:
        """The launch of a kernel that does the same and more, in the same programs.

        Args:
            kernel: takes further tensors after those of this one, and further numbers, `numbers`, after its numbers.
        """
        return Launch(kernel, self._grid, (*self._numbers, *numbers), **self._constants)

    def at(self, *addresses: int) -> bool:
        """Launch it for tensors of which nothing but the addresses is new, if Triton need not look at them.

        Args:
            addresses: of what a call takes, 0 for None; of `Rows`, that of the first one.

        Returns:
            Whether it was launched. It is not before the first call, and not at addresses between multiples of 16
            bytes: then call it.
        """
        if self._run is None:
            return False
        together = 0
        for each in addresses:
            together |= each
        if together & 15:
            return False
        self.at_multiples(*addresses)
        return True

    @property
    def prepared(self) -> bool:
        """Whether `at_multiples` can be called."""
        return self._run is not None

    def at_multiples(self, *addresses: int) -> None:
        """As `at`, of a prepared launch, where all addresses are known to be multiples of 16 bytes."""
        run = self._run
        assert run is not None, "a launch takes tensors first"
        short = run.short
        if not self._rows:
            (short or run)([*addresses, *self._rest])
            return
        first, end = self._rows[0], self._rows[-1] + 1
        kept = self._kept.get(addresses[first:end])
        rows, expanded = self._rows_at(run, addresses) if kept is None else kept
        between = rows if short is None else expanded
        (short or run)([*addresses[:first], *between, *addresses[end:], *self._rest])

    def _rows_at(self, run: Runner, addresses: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
        """What stands between the first and the last rows, kept for the next launch."""
        if len(self._kept) >= KEPT_ROWS:
            self._kept.clear()
        first, end = self._rows[0], self._rows[-1] + 1
        arguments: list[Any] = list(addresses)
        for place in self._rows:
            arguments[place] = PlacedRows(addresses[place], *self._like[place])
        rows = arguments[first:end]
        # Descriptors are known by their places among all arguments.
        expanded = run.expanded(arguments)
        kept = self._kept[addresses[first:end]] = rows, expanded[first : len(expanded) - len(arguments) + end]
        return kept

    def _keep(self, compiled: Any, tensors: Sequence[Any]) -> None:
        """Note what was compiled, if it was for addresses at multiples of 16 bytes."""
        places = [place for place, tensor in enumerate(tensors) if isinstance(tensor, torch.Tensor)]
        if any(tensors[place].data_ptr() & 15 for place in places):
            return
        names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
        absent: list[Any] = [0] * len(tensors)
        self._rest = [*self._numbers, *(self._constants[name] for name in names)]
        self._arguments = absent + self._rest
        self._tensors = places
        self._rows = [place for place, tensor in enumerate(tensors) if isinstance(tensor, Rows)]
        self._like = {place: (tensors[place].shape, tensors[place].strides) for place in self._rows}
        self._run = runner(compiled, self._grid)


def address_of(tensor: torch.Tensor | None) -> int:
    """The address of a tensor for `Launch.at`."""
    return 0 if tensor is None else tensor.data_ptr()


class PlacedRows:
    """What a launch reads of a descriptor of rows of a tensor.

    Attributes:
        address: of the first row.
        shape, strides: of the rows, in elements.
        padding: what lies past their ends.
        round_f32_to_tf32: whether float32 is rounded on its way; read by Triton 3.7 and newer.
    """

    __slots__ = ("address", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, address: int, shape: Shape, strides: Shape) -> None:
        self.address, self.shape, self.strides = address, shape, strides

    @property
    def base(self) -> PlacedRows:
        """What tells the address."""
        return self

    def data_ptr(self) -> int:
        """The address of the first row."""
        return self.address


class Rows(PlacedRows, ABC):
    """Rows of a tensor for a kernel that takes a descriptor of them, which can be made where it is compiled."""

    __slots__ = ()

    @abstractmethod
    def descriptor(self) -> Any:
        """The descriptor, with all that it checks, by which Triton compiles the kernel."""
