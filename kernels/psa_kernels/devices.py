"""Facts about a device, which never change, so that each is looked up once; and what is around calls on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def entry_point(function: Function) -> Function:
    """Make the GPU of a function's first argument, a tensor, the current one while it runs, and switch autocast off.

    Triton launches on the current device and its stream, and a model may be on another one: `pipe.to("cuda:1")`.
    Autocast would take the precision of each step, which the operator chooses, from some of them.
    """

    name = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(name)
        if not isinstance(first, torch.Tensor):
            return function(*args, **kwargs)
        on_gpu = first.is_cuda
        # The long way takes a microsecond, which counts for the small calls of a GPU.
        if torch.is_autocast_enabled("cuda") if on_gpu else is_autocast_enabled(first.device):
            with torch.autocast(first.device.type, enabled=False):
                return run(*args, **kwargs)
        if on_gpu and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device.

    `meta` has none, and PyTorch raises an error if asked for it. `torch.amp.is_autocast_available` would tell, but
    before PyTorch 2.13 no graph can hold it.
    """
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; that of the smallest supported one for a CPU, on which the interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.version.hip is None and capability(device) == (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, on which the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def cache_bytes(device: torch.device) -> int:
    """Size of the cache that all multiprocessors of a GPU share."""
    return torch.cuda.get_device_properties(device).L2_cache_size
