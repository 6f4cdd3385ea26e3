"""Whether a kernel serves a call: for callers who have another way to compute it."""

from __future__ import annotations

from psa_kernels.backends import BACKENDS
from psa_kernels.call import Call


def pays_and_serves(call: Call, implementation: str) -> tuple[bool, str | None]:
    """Whether an implementation should compute a call natively; and why not, if it cannot.

    Args:
        implementation: as of `psa_attention`, but not `auto`.

    Returns:
        True and None if it can, and pays as `auto` sees it; False and None if it does not pay; False and the reason, in
        one line, if it cannot.
    """
    backend = next(each for each in BACKENDS if each.implementation == implementation and "native" in each.precisions)
    obstacle = backend.why_not(call)
    return obstacle is None and backend.pays(call), obstacle


def why_no_kernel(call: Call) -> str | None:
    """Why `auto` would compute a call on a GPU by the reference, which is made for CPUs.

    Returns:
        None if a kernel serves the call, and on a CPU. Else the reason of the kernel that serves most calls, in one
        line.
    """
    device, precisions = call.q.device.type, {call.spec.precision, "native"}
    if device == "cpu":
        return None
    kernels = [each for each in BACKENDS[:-1] if device in each.devices and precisions.intersection(each.precisions)]
    obstacles = [backend.why_not(call) for backend in kernels]
    if None in obstacles:
        return None
    return obstacles[-1] if obstacles else f"device {call.q.device}: expected {' or '.join(BACKENDS[0].devices)}"
