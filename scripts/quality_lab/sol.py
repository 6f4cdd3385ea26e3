"""Sol-Attn in a pipeline: its own kernel in place of PSA's sparse attention, and its rule as a preset of ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from operator_bench import sol_int8
from operator_bench.sol_int8 import BLOCK, Rule

from psa_diffusers import Preset, load_preset
from psa_diffusers.errors import InputError
from psa_diffusers.families import AttentionCall
from psa_diffusers.patch.attend import QKV, Parts, TokenAttention
from psa_diffusers.patch.run import Forward
from psa_diffusers.patch.sites import Layer
from psa_kernels import AttentionSpec, AttentionStats


def as_preset(share: float) -> Preset:
    """Sol-Attn's rule by PSA's operator: that share of exact blocks by the scores of means, one mean for each other.

    Two things are not as in Sol-Attn. Blocks beside the diagonal are exact only if they are chosen. And each query has
    its own score with the mean key of a block, where Sol-Attn takes that of the query block's mean for all its queries.
    """
    return load_preset("psa-1").replace(
        block={"query": BLOCK, "key": BLOCK},
        levels=[1],
        thresholds=[share],
        importance={"estimator": "pooled", "statistic": "mean", "query_stride": BLOCK, "key_stride": BLOCK},
        rest="mean",
        order="raster",
        min_tokens=0,
    )


@dataclass(frozen=True)
class SolAttention:
    """Computes sparse calls by `comfy_kitchen.sol_attn`: raster order, video tokens alone."""

    rule: Rule

    @property
    def about(self) -> str:
        return f"comfy_kitchen.sol_attn, {self.rule.kind} {self.rule.value:g}"

    def obstacle(self, device: str) -> str | None:
        """Why it cannot compute on a device, in one line."""
        return sol_int8.obstacle(device)

    @cached_property
    def _spec(self) -> AttentionSpec:
        """What its statistics count by: exact blocks, and a 64th of the cost for each pooled one."""
        return AttentionSpec(block_query=BLOCK, block_key=BLOCK, levels=(1,), thresholds=(1.0,), rest="mean")

    def __call__(
        self, _attention: TokenAttention, layer: Layer, _forward: Forward, qkv: QKV, call: AttentionCall
    ) -> tuple[Parts, list[AttentionStats]]:
        if call.text_tokens:
            raise InputError(f"{layer.name}: has {call.text_tokens} text tokens; Sol-Attn is given video tokens alone")
        out = self.rule(qkv)().contiguous()
        exact = self.rule.exact(*qkv[:2])
        listed = exact.sum((2, 3), dtype=torch.int32)[..., None]
        by = "comfy-kitchen" if out.is_cuda else "comfy-kitchen, reference"
        return (out, out[:, :0]), [AttentionStats(listed, exact[0, 0].numel(), self._spec, by)]
