"""Ways of attending, and what makes each have a density."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from psa_kernels import psa_attention
from psa_presets import Preset
from psa_presets.density import scaled_thresholds
from psa_transformers import settings

# Rule, levels, and the cumulative shares that are scaled to a density: psa-1's, psa-3's, the paper's of the mass rule.
METHODS: dict[str, tuple[str, tuple[int, ...], tuple[float, ...]]] = {
    "binary": ("count", (1,), (0.25,)),
    "psa-3": ("count", (1, 2, 4), (0.15, 0.25, 0.45)),
    "mass": ("mass", (1, 2, 4), (0.7, 0.8, 0.9)),
    "budget": ("budget", (1, 2, 4), ()),
}
LOWEST = 1e-4  # of what is scaled
NEAR = 0.01  # a density that is so much above the one aimed at is out of reach


@dataclass(frozen=True)
class Way:
    """One way of attending.

    Attributes:
        method: of `METHODS`.
        kept: whether each row reads the first key block and the two before its diagonal exactly, as `apply_psa` has it.
        target: the density aimed at.
    """

    method: str
    kept: bool
    target: float

    @property
    def depends_on_text(self) -> bool:
        return METHODS[self.method][0] == "mass"

    @property
    def highest(self) -> float:
        """Every block is at the first level from here on."""
        shares = METHODS[self.method][2]
        return 1 / shares[0] if shares else 1.0

    def preset(self, value: float, block: tuple[int, int]) -> Preset:
        """
        Args:
            value: thresholds are scaled with it; of the rule `budget` it is the density.
            block: tokens of a query block and of a key block.
        """
        rule, levels, shares = METHODS[self.method]
        about = {"density": value} if rule == "budget" else {"thresholds": scaled_thresholds(shares, value, digits=9)}
        return Preset(
            name="evaluated",
            block={"query": block[0], "key": block[1]},
            rule=rule,
            levels=levels,
            dense_steps=0,
            float32_on_gpu="sparse",
            **about,
        )


@contextmanager
def kept_blocks(kept: bool) -> Iterator[None]:
    """Patches that are made meanwhile keep the first and last blocks exact, or do not."""
    if kept:
        yield
    else:
        with mock.patch.multiple(settings, KEEP_FIRST=0, KEEP_LAST=0):
            yield


def value_for(way: Way, density_of: Callable[[float], float], steps: int) -> float | None:
    """What a way has to be made with to have its density, found by halving; None if its least is more than that.

    Args:
        density_of: what a value leads to; does not fall.
    """
    low, high = LOWEST, way.highest
    if density_of(low) > way.target + NEAR:
        return None
    for _ in range(steps):
        middle = (low + high) / 2
        if density_of(middle) <= way.target:
            low = middle
        else:
            high = middle
    return low


def density_of_noise(
    way: Way, value: float, tokens: int, block: tuple[int, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """The density of one layer that attends noise: for rules whose density does not depend on what is attended."""
    q, k, v = torch.randn(3, 1, tokens, 1, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with kept_blocks(way.kept):
        (spec,) = settings.causal_specs(way.preset(value, block), 1)
    assert spec is not None
    _, stats = psa_attention(q, k, v, spec, causal=True, return_stats=True)
    return float(stats.density.mean())
