"""The portable kernels with an attention kernel made for Hopper GPUs, of compute capability 9.0."""

from __future__ import annotations

import torch

from psa_kernels.backends import self_test
from psa_kernels.backends.triton import Triton, triton_version
from psa_kernels.call import Call
from psa_kernels.devices import is_hopper
from psa_kernels.limits import MAX_HOPPER_LEVELS, MIN_HOPPER_ROWS

# Gluon changes from one release of Triton to the next: with any but these a self-test decides.
KNOWN_VERSIONS = ("3.6.",)
# Floating point operations of dense attention. The kernel's launch takes the host a tenth of a millisecond longer than
# the portable one's; below this work it saves the GPU less than that (docs/benchmarks/host.json).
MIN_HOPPER_WORK = 4e11


class Hopper(Triton):
    """Needs what the portable kernels need, and more."""

    name = implementation = "hopper"
    causal_attention, attention = "causal.hopper", "sparse.hopper.launch"
    gathered = True
    in_one_go: tuple[str, str] | None = ("pool_and_attend_hopper", "PoolAndAttendHopper")

    def pays(self, call: Call) -> bool:
        return is_hopper(call.q.device) and call.dense_work >= MIN_HOPPER_WORK

    def why_not(self, call: Call) -> str | None:
        obstacle = super().why_not(call) or _why_not_at_these_addresses(call)
        if obstacle is None and not triton_version().startswith(KNOWN_VERSIONS):
            return self_test.obstacle(self, call)
        return obstacle

    def _why_not_such(self, call: Call) -> str | None:
        return super()._why_not_such(call) or self._why_not_beside_triton(call)

    def _why_not_beside_triton(self, call: Call) -> str | None:
        q, spec = call.q, call.spec
        if not is_hopper(q.device):
            return f"device {q.device}: expected a GPU of compute capability (9, 0)"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"dtype {q.dtype}: expected torch.bfloat16 or torch.float16"
        if q.shape[-1] not in (64, 128):
            return f"head_dim={q.shape[-1]}: expected 64 or 128"
        if spec.block_query % 128:
            return f"block_query={spec.block_query}: expected 128"
        if spec.block_key not in (32, 64, 128):
            return f"block_key={spec.block_key}: expected 32, 64 or 128"
        if spec.block_key // spec.levels[-1] < MIN_HOPPER_ROWS or len(spec.levels) > MAX_HOPPER_LEVELS:
            return (
                f"levels={list(spec.levels)}: expected at most {MAX_HOPPER_LEVELS}, and at least {MIN_HOPPER_ROWS} "
                f"rows of each of the {spec.block_key} keys"
            )
        if spec.rest != "skip":
            return f"rest={spec.rest!r}: expected 'skip'"
        if not call.scale > 0:
            return f"scale={call.scale}: expected more than 0"
        for name, x in (("q", q), ("k", call.k), ("v", call.v)):
            if any(stride % 8 for stride in x.stride()[:3]):
                return _misaligned(name, x)
        return None


def _why_not_at_these_addresses(call: Call) -> str | None:
    if not (call.q.data_ptr() | call.k.data_ptr() | call.v.data_ptr()) & 15:
        return None
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.data_ptr() % 16:
            return _misaligned(name, x)
    return None


def _misaligned(name: str, x: torch.Tensor) -> str:
    return f"{name}: expected rows at multiples of 16 bytes, got strides {x.stride()}"
