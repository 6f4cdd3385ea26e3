"""Facts about a device that every call needs; they never change, so each is looked up once."""

from __future__ import annotations

from functools import cache

import torch


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
