"""All backends, the fastest first. A new kernel is one file here and one line below."""

from __future__ import annotations

from psa_kernels.backends.base import Backend
from psa_kernels.backends.hopper import Hopper
from psa_kernels.backends.hopper_int8 import HopperInt8
from psa_kernels.backends.reference import Reference
from psa_kernels.backends.triton import Triton
from psa_kernels.backends.triton_int8 import TritonInt8

# The last one serves every call.
BACKENDS: tuple[Backend, ...] = (HopperInt8(), Hopper(), TritonInt8(), Triton(), Reference())
