"""The portable kernels, for GPUs of compute capability 8.0 or newer.

Kernels are imported only where they run: PyTorch's CPU builds come without triton.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from psa_kernels.backends.base import Backend
from psa_kernels.call import Call
from psa_kernels.devices import capability
from psa_kernels.limits import MAX_BLOCK_SAMPLES, MAX_KEY_BLOCKS
from psa_kernels.lists import BlockLists

# Values of up to so many bytes are pooled together with the keys, which saves a small call a launch.
FEW_VALUES = 1 << 26


class Triton(Backend):
    """One source for every GPU; only tile sizes differ."""

    name = implementation = "triton"
    # Whose `sparse_attention` attends, in causal calls and in others.
    causal_attention, attention = "causal.triton_attention", "sparse.triton"
    # Whether the pyramid holds single tokens too where they are permuted.
    gathered = False
    # What pools and attends in one go, of a module and by name; None where `attend` needs keys that are pooled.
    in_one_go: tuple[str, str] | None = ("pool_and_attend", "PoolAndAttend")

    def why_not(self, call: Call) -> str | None:
        if call.q.device.type != "cuda":  # the interpreter may come and go
            return self._why_not_such(call)
        key = self.name, "why not"
        if key not in call.answers:
            call.answers[key] = self._why_not_such(call)
        return call.answers[key]

    def _why_not_such(self, call: Call) -> str | None:
        """The reason why it serves no calls of these shapes and settings."""
        q, spec, permutation = call.q, call.spec, call.layout.permutation
        if not has_triton():
            return "the package triton is not installed"
        # On a CPU they run in Triton's interpreter: slow, and wrong in bfloat16.
        interpreted = q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        dtypes = (torch.float16, torch.float32) + (() if interpreted else (torch.bfloat16,))
        if q.device.type != "cuda" and not interpreted:
            return f"device {q.device}: expected a CUDA device"
        if q.is_cuda and torch.version.hip is None and capability(q.device) < (8, 0):
            return f"compute capability {capability(q.device)}: expected (8, 0) or newer"
        if q.dtype not in dtypes:
            return f"dtype {q.dtype}: expected one of {', '.join(map(str, dtypes))}"
        if q.shape[-1] > 256:
            return f"head_dim={q.shape[-1]}: expected at most 256"
        if spec.block_query not in (64, 128):
            return f"block_query={spec.block_query}: expected 64 or 128"
        if spec.block_key not in (16, 32, 64, 128, 256):
            return f"block_key={spec.block_key}: expected 16, 32, 64, 128 or 256"
        if spec.block_key // spec.importance.key_stride > MAX_BLOCK_SAMPLES:
            return (
                f"block_key={spec.block_key} with importance.key_stride={spec.importance.key_stride}: expected at most "
                f"{MAX_BLOCK_SAMPLES} samples a key block"
            )
        if call.key_blocks > MAX_KEY_BLOCKS:
            return f"{call.key_blocks} key blocks: expected at most {MAX_KEY_BLOCKS}"
        if permutation is not None and permutation.device != q.device:
            return f"permutation on {permutation.device}: expected {q.device}"
        return None

    def pyramid_rows(self, call: Call) -> int:
        """Rows of the pyramid, worked out once for calls like this one."""
        key = self.name, "pyramid rows"
        if key not in call.answers:
            from psa_kernels.pyramid.triton import pyramid_rows

            call.answers[key] = pyramid_rows(call.layout, call.spec, self.gathered)
        return call.answers[key]

    def pool_keys(self, call: Call, selects: bool, alone: bool = False) -> Any:
        """The pyramid of keys; with values too, if the selection reads them or holding them meanwhile costs little.

        None if all heads are attended at once, and `select` reads nothing of the pyramid: `attend` makes it then.
        """
        pyramid = kernels("pyramid.triton")
        k, layout, spec = call.k, call.layout, call.spec
        if selects and spec.rule == "budget" and call.causal is None:
            statistics = kernels("allocation.triton_statistics")
            if statistics.pools_alike(spec):
                # Keys and values are read once for the pyramid and for the prices.
                both = pyramid.empty_pyramid(k, call.v, layout, spec, self.gathered)
                of_keys = statistics.key_spread(k, layout, spec, both.keys, both.factors)
                of_values = statistics.value_spread(call.v, layout, spec, both.values, both.factors)
                return replace(both, key_spread=of_keys, value_spread=of_values)
        if alone and call.causal is None and self.in_one_go and not (selects and spec.similarity is not None):
            return None
        v = call.v if alone and (not selects or call.v.nbytes <= FEW_VALUES) else None
        return pyramid.pool_keys(k, layout, spec, selects, self.gathered, v, call.answers)

    def select(self, call: Call, keys: Any) -> BlockLists:
        if call.causal is not None:
            from psa_kernels.causal.triton_select import select

            return select(call, call.causal, keys)
        q, k, layout, spec, scale = call.q, call.k, call.layout, call.spec, call.scale
        importance = kernels("importance.triton").block_importance(q, k, layout, spec, scale, call.answers)
        if spec.rule == "budget":
            found = (None, None) if keys is None else (keys.key_spread, keys.value_spread)
            priced = kernels("allocation.triton_prices")
            prices = priced.upgrade_prices(q, k, call.v, importance, layout, spec, scale, *found)
            chosen: BlockLists = kernels("allocation.triton_budget").allocate_budget(prices, importance, spec)
            return chosen
        coarsest = None if keys is None else keys.coarsest
        if keys is None and spec.similarity is not None:
            coarsest = kernels("pyramid.triton").coarsest_levels(k, layout, spec)
        lists: BlockLists = kernels("allocation.triton").allocate(importance, coarsest, spec, call.answers)
        return lists

    def attend(self, call: Call, keys: Any, lists: BlockLists, out: torch.Tensor) -> None:
        if keys is None:
            self._pool_and_attend(call, lists, out)
            return
        pyramid = kernels("pyramid.triton").add_values(keys, call.v, call.layout)
        if call.causal is not None:
            attention = kernels(self.causal_attention)
            attention.sparse_attention(call.q, pyramid, lists, call.causal, call.spec, call.scale, out)
            return
        attention = kernels(self.attention)
        attention.sparse_attention(
            call.q, pyramid, lists, call.layout, call.spec, call.scale, out=out, known=call.answers
        )

    def _pool_and_attend(self, call: Call, lists: BlockLists, out: torch.Tensor) -> None:
        """`attend` without a pyramid, prepared once for calls and lists like these."""
        key = self.name, "in one go", lists.ids.shape[3], lists.ids.dtype, out.stride()
        prepared = call.answers.get(key)
        if prepared is None:
            assert self.in_one_go is not None, "pool_keys returned a pyramid"
            module, name = self.in_one_go
            prepared = call.answers[key] = getattr(kernels(module), name)(call, lists, out, self.gathered)
        prepared(call, lists, out)

    def attend_causal_text(self, call: Call, parts: Sequence[slice], out: torch.Tensor) -> None:
        from psa_kernels.causal.triton_dense import dense_causal_attention

        for part in parts:
            dense_causal_attention(call.q, call.k, call.v, call.scale, part, out)


@cache
def kernels(module: str) -> Any:
    """A module of this package with kernels; a statement that imports one costs every call a microsecond."""
    return import_module(f"psa_kernels.{module}")


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Whether the portable kernels run on a device, outside of the interpreter."""
    return device.type == "cuda" and has_triton() and (torch.version.hip is not None or capability(device) >= (8, 0))


@cache
def triton_version() -> str:
    """The version of the installed triton."""
    import triton

    return str(triton.__version__)
