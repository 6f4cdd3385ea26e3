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
