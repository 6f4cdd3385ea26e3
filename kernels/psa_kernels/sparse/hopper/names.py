"""What Gluon calls differently in different versions of Triton; the arguments are the same."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

# Triton 3.8 has a new name for both, and 3.9 no other.
_RENAMED = hasattr(async_copy, "async_load")
copy_rows = async_copy.async_load if _RENAMED else async_copy.async_copy_global_to_shared
copy_boxes = tma.async_load if _RENAMED else tma.async_copy_global_to_shared
# Public from 3.9 on. Shared memory, a dtype, a shape and a layout: the same memory as a tensor of these.
_PUBLIC = hasattr(gl.shared_memory_descriptor, "reinterpret")
reinterpret = gl.shared_memory_descriptor.reinterpret if _PUBLIC else gl.shared_memory_descriptor._reinterpret
