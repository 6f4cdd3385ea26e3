"""What serves a call, asked before it is computed by those who have another way to compute it."""

from __future__ import annotations

from psa_kernels.backends import BACKENDS
from psa_kernels.call import Call


def pays_and_serves(call: Call, implementation: str) -> tuple[bool, str | None]:
    """Whether an implementation should compute a call natively, and if it cannot, why.

    Args:
        implementation: as of `psa_attention`, but not `auto`.

    Returns:
        True and None where it can and `auto` would find that it pays; False and None where it does not pay; False and
        the reason, in one line, where it cannot.
    """
    backend = next(each for each in BACKENDS if each.implementation == implementation and "native" in each.precisions)
    obstacle = backend.why_not(call)
    return obstacle is None and backend.pays(call), obstacle


def why_no_kernel(call: Call) -> str | None:
    """Why `auto` would leave a call to the reference, which is made for CPUs, on another device.

    Returns:
        None where a kernel serves the call, and on a CPU; else the reason of the kernel that serves most, in one line.
    """
    device, precisions = call.q.device.type, {call.spec.precision, "native"}
    if device == "cpu":
        return None
    kernels = [each for each in BACKENDS[:-1] if device in each.devices and precisions.intersection(each.precisions)]
    obstacles = [backend.why_not(call) for backend in kernels]
    if None in obstacles:
        return None
    return obstacles[-1] if obstacles else f"device {call.q.device}: expected {' or '.join(BACKENDS[0].devices)}"
