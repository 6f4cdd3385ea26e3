"""Copies of rows between tensors on GPUs by the copy engines, which takes no multiprocessor from other work."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address tells which device it is on


class _Copy2D(ctypes.Structure):
    """The driver's CUDA_MEMCPY2D: rows of `width` bytes, each `pitch` bytes after the one before it."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuMemcpy2DAsync_v2


def has_whole_rows(x: torch.Tensor) -> bool:
    """Whether the channels of all heads of a token, `[..., H, D]`, are one after the other in memory."""
    heads, width = x.shape[-2:]
    return (x.stride(-1) == 1 or width == 1) and (x.stride(-2) == width or heads == 1)


def copy_rows(to: torch.Tensor, x: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Copy `[B, N, h, D]` to a tensor of the same shape and dtype; each token's heads and channels must be contiguous.

    The driver's function is called directly, because PyTorch copies tensors that are not contiguous by a kernel.

    Args:
        stream: the current stream of the current device.

    Raises:
        RuntimeError: the driver refuses.
    """
    batch, tokens, heads, channels = x.shape
    size = x.element_size()
    width = heads * channels * size
    if not batch * tokens * width:
        return
    # Of a single row the pitch says nothing, but may not be smaller than the row.
    pitches = [max(each.stride(1) * size, width) for each in (x, to)]
    each = _Copy2D(
        src_type=_UNIFIED, src_pitch=pitches[0], dst_type=_UNIFIED, dst_pitch=pitches[1], width=width, height=tokens
    )
    for sample in range(batch):
        each.src = x.data_ptr() + sample * x.stride(0) * size
        each.dst = to.data_ptr() + sample * to.stride(0) * size
        if code := _driver()(ctypes.byref(each), ctypes.c_void_p(stream.cuda_stream)):
            raise RuntimeError(f"cuMemcpy2DAsync of {tuple(x.shape)} {x.dtype}: the driver's error {code}")
