"""Rotary positions: pairs of neighbouring channels are turned by angles that all layers of a forward share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from psa_diffusers.families.parts import ReadOnce, concatenate, rotate_pairs

if TYPE_CHECKING:
    import torch

    Tables = tuple[torch.Tensor, torch.Tensor]


class Rotation:
    """Rotates queries or keys, `[B, N, ...]`, by a model's tables.

    On GPUs that Triton serves, one kernel does it. Elsewhere a pair of channels is a complex number, and
    turning it a product: three kernels, where `rotate_pairs` takes eight and moves twice the bytes. Complex
    tables, and those brought from another device, are kept while the model's tables live. Inside of graphs, where a
    compiler fuses what is written out, and for tables and devices that neither suits, `rotate_pairs` does it.

    Args:
        halve: makes of a model's tables those of `rotate_pairs`, which broadcast against the tensors' pairs.
    """

    def __init__(self, halve: Callable[[torch.Tensor, torch.Tensor], Tables]) -> None:
        self._halve = halve
        self._kept: dict[torch.device, ReadOnce[Any]] = {}

    def __call__(self, tables: Tables, x: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
        """The rotated tensor, in its dtype.

        Args:
            tables: cosines and sines as the model made them.
            before, after: how many of the first and last tokens have no positions, and are left as they are.
        """
        device = x.device
        if not _suits(x, *tables):
            cos, sin = (table.to(device) for table in self._halve(*tables))
            return _written_out(x, cos, sin, before, after)
        from psa_kernels.backends.triton import has_kernels
        from psa_kernels.rotation.choose import rotate

        if not has_kernels(device):
            turns = self._once(device, self._complex, tables)
            return _turned(x, turns, before, after)
        here = all(table.device == device for table in tables)
        cos, sin = self._halve(*tables) if here else self._once(device, self._brought, tables)
        return rotate(x, cos, sin, before, after)

    def _once(self, device: torch.device, make: Callable[..., Any], tables: Tables) -> Any:
        """What `make`, the same one for all calls of a device, makes of the tables, as long as they live."""
        # A captured graph reads what it made itself: what is kept here may be gone at its replay.
        if _is_capturing(device):
            return make(device, *tables)
        if (kept := self._kept.get(device)) is None:
            kept = self._kept[device] = ReadOnce(partial(make, device))
        return kept(*tables)

    def _complex(self, device: torch.device, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.complex(*self._halve(cos, sin)).to(device)

    def _brought(self, device: torch.device, cos: torch.Tensor, sin: torch.Tensor) -> Tables:
        cos, sin = self._halve(cos, sin)
        return cos.to(device), sin.to(device)


def _suits(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether what is computed in float32 is what `rotate_pairs` does: without a gradient, and not in a graph."""
    import torch

    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not cos.dtype == sin.dtype == torch.float32:
        return False
    kinds = torch.bfloat16, torch.float16, torch.float32
    return type(x) is torch.Tensor and x.dtype in kinds and (x.is_cuda or x.is_cpu)


def _turned(x: torch.Tensor, turns: torch.Tensor, before: int, after: int) -> torch.Tensor:
    import torch

    # Other tokens pass through float32 and back unchanged.
    copy = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(copy.unflatten(-1, (-1, 2)))
    if before or after:
        pairs = pairs[:, before : pairs.shape[1] - after]
    pairs.mul_(turns)
    return copy.to(x.dtype)


def _written_out(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, before: int, after: int) -> torch.Tensor:
    end = x.shape[1] - after
    parts = [x[:, :before]] if before else []
    parts.append(rotate_pairs(x[:, before:end] if before or after else x, cos, sin))
    parts += [x[:, end:]] if after else []
    return parts[0] if len(parts) == 1 else concatenate(*parts)


def _is_capturing(device: torch.device) -> bool:
    import torch

    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def every_other(cos: torch.Tensor, sin: torch.Tensor) -> Tables:
    """The tables of `rotate_pairs`, of tables that hold each angle twice."""
    return cos[..., ::2], sin[..., ::2]


def rotate_tokens(tables: Any, x: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """Rotate `[B, N, H, D]` by tables `[N, D]`, cosines and sines, that hold each angle twice; None rotates nothing.

    Arguments and results are those of `Rotation`.
    """
    return x if tables is None else _by_token(tables, x, before, after)


_by_token = Rotation(lambda cos, sin: (cos[:, None, ::2], sin[:, None, ::2]))
