"""The choice of a backend for a call."""

from __future__ import annotations

import warnings
from functools import cache

from psa_kernels.backends import BACKENDS
from psa_kernels.backends.base import Backend
from psa_kernels.call import Call

IMPLEMENTATIONS = ("auto", *dict.fromkeys(backend.implementation for backend in reversed(BACKENDS)))


class SlowerKernelWarning(UserWarning):
    """A call gets a slower implementation than its device has."""


def choose(call: Call, wanted: str = "auto", strict: bool = False) -> Backend:
    """The backend of one call.

    `auto` takes the first of `BACKENDS` that pays and can serve the call. If one that pays cannot serve it, `auto`
    warns once for each reason. If no backend has the precision, one that computes natively serves the call.

    Args:
        wanted: one of `IMPLEMENTATIONS`.
        strict: raise instead of that warning.

    Raises:
        ValueError: the wanted implementation cannot serve the call; or the call is causal and on a GPU, no kernel
            can serve it, and the reference is not asked for by name.
        RuntimeError: strict, and `auto` would take a slower implementation than the device has, or one without the
            precision that the spec asks for.
    """
    if wanted != "auto":
        return _named(call, wanted)
    precision, device = call.spec.precision, call.q.device.type
    for backend in BACKENDS[:-1]:
        exact = precision in backend.precisions
        if device not in backend.devices or not (exact or "native" in backend.precisions) or not backend.pays(call):
            continue
        obstacle = backend.why_not(call)
        if obstacle is None:
            return backend
        problem = f"the {backend.name} kernel cannot be used"
        if exact and precision != "native":
            problem = f"precision={precision!r} cannot be used"
        if call.causal is not None and backend is BACKENDS[-2]:
            # The reference goes through a causal call row by row, so it is taken only if asked for.
            raise ValueError(
                f"causal=True on {device}: {problem}: {obstacle}; implementation='reference' computes it, slowly"
            )
        if strict:
            raise RuntimeError(f"strict: {problem}: {obstacle}")
        _warn_once(f"{problem}, attention is slower: {obstacle}")
    return BACKENDS[-1]


def _named(call: Call, wanted: str) -> Backend:
    """The backend of an implementation that has the precision of the spec."""
    if wanted not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={wanted!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    precision = call.spec.precision
    found = [backend for backend in BACKENDS if backend.implementation == wanted]
    backend = next((each for each in found if precision in each.precisions), found[0])
    obstacle = backend.why_not(call)
    if obstacle is None and precision not in backend.precisions:
        obstacle = f"precision={precision!r}: expected {' or '.join(map(repr, backend.precisions))}"
    if obstacle is not None:
        raise ValueError(f"implementation={wanted!r}: {obstacle}")
    return backend


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, SlowerKernelWarning, stacklevel=4)
