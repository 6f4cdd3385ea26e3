"""The lines of `bench_stack.py`: what is switched on, one thing after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import FirstBlockCacheConfig
from one_step import scaled_preset
from random_models import Machine, compile_forwards

from psa_diffusers import Preset

DENSITY = 0.15
REFRESH = 4
CONTEXT = "one branch"


@dataclass(frozen=True)
class Line:
    """What is on beside compiled blocks and cuDNN.

    Attributes:
        psa: sparse attention at `DENSITY`.
        float8: linear layers in 8 bits, with a scale a "row" or one a "tensor"; None without.
        kept: lists that serve `REFRESH` steps and both guidance branches.
        dense_psa: dense steps by the kernel of PSA.
        cache: threshold of diffusers' first-block cache; None without it.
    """

    psa: bool = False
    float8: str | None = None
    kept: bool = False
    dense_psa: bool = False
    cache: float | None = None

    @property
    def name(self) -> str:
        """What is on, in words."""
        words = {
            f"PSA at {DENSITY}": self.psa,
            "linear layers in float8": self.float8 == "row",
            "linear layers in float8, a scale a tensor": self.float8 == "tensor",
            "kept lists": self.kept,
            "dense steps by PSA": self.dense_psa,
            "first-block cache": self.cache is not None,
        }
        return " + ".join(["stock compiled", *(word for word, is_on in words.items() if is_on)])

    def preset(self, machine: Machine) -> Preset:
        """Its preset: psa-3 in raster order, which needs no permutation, scaled to the density."""
        chosen = scaled_preset(machine, DENSITY).replace(order="raster")
        if self.kept:
            chosen = chosen.replace(refresh=REFRESH, share_guidance=True)
        return chosen.replace(dense_attention="psa") if self.dense_psa else chosen

    def forwards_a_list(self, branches: int) -> int:
        """How many forwards one set of lists serves."""
        return REFRESH * branches if self.kept else 1


def lines(cache: float, scales: str) -> Iterator[tuple[str, Line]]:
    """The field that each line switches on, and the line with all before it.

    Args:
        cache: `Line.cache` of the last line.
        scales: `Line.float8` of those that have it.
    """
    line = Line()
    yield "", line
    for field, value in (("psa", True), ("float8", scales), ("kept", True), ("dense_psa", True), ("cache", cache)):
        line = replace(line, **{field: value})
        yield field, line


def quantise_linear(transformer: torch.nn.Module, scales: str) -> None:
    """Linear layers of the blocks in 8 bits, inputs quantised as they come, by torchao.

    Layers that a model keeps in float32, and those outside its blocks, stay as they are.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_

    def is_served(module: torch.nn.Module, name: str) -> bool:
        if not isinstance(module, torch.nn.Linear) or "blocks." not in name:
            return False
        return module.weight.dtype is torch.bfloat16 and not any(size % 16 for size in module.weight.shape)

    # torchao would turn on a search among kernels that takes longer than all other lines together.
    granularity = PerRow() if scales == "row" else PerTensor()
    config = Float8DynamicActivationFloat8WeightConfig(granularity=granularity, set_inductor_config=False)
    quantize_(transformer, config, filter_fn=is_served)


@contextmanager
def cached(transformer: torch.nn.Module, threshold: float, backend: str) -> Iterator[None]:
    """The first-block cache on a transformer of compiled blocks, in one context; all is off again afterwards."""
    if type(transformer).__name__ == "MiniMaxH3Transformer3DModel":
        _register_minimax_h3()
    blocks = compile_forwards(transformer, backend)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        with transformer.cache_context(CONTEXT):
            yield
    finally:
        transformer.disable_cache()
        for block in blocks:
            del block.forward


def _register_minimax_h3() -> None:
    """Tell diffusers' caches of MiniMax-H3's blocks, which diffusers 0.42.1 does not."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3TransformerBlock

    TransformerBlockRegistry.register(MiniMaxH3TransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
