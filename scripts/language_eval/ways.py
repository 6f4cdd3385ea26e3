"""Ways of attending, and what makes each have a density."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from psa_kernels import AttentionSpec, select_blocks
from psa_kernels.call import make_call
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
GOOD = 0.002  # as near as a search has to come to it
STEPS = 12


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

    def spec(self, value: float, block: tuple[int, int]) -> AttentionSpec:
        """What each layer computes, with the arguments of `preset`."""
        with kept_blocks(self.kept):
            (spec,) = settings.causal_specs(self.preset(value, block), 1)
        assert spec is not None  # no rule for layers keeps it dense
        return spec


@contextmanager
def kept_blocks(kept: bool) -> Iterator[None]:
    """Patches that are made meanwhile keep the first and last blocks exact, or do not."""
    if kept:
        yield
    else:
        with mock.patch.multiple(settings, KEEP_FIRST=0, KEEP_LAST=0):
            yield


def value_for(way: Way, density_of: Callable[[float], float], steps: int = STEPS) -> float | None:
    """What a way has to be made with to have its density or nearly so; None if its least is more than that.

    Halving, and interpolation in turns, which ends sooner where the density is nearly linear.

    Args:
        density_of: what a value leads to; does not fall.
        steps: how many values are tried at most.
    """
    (low, least), (high, most) = (LOWEST, density_of(LOWEST)), (way.highest, 1.0)
    if least > way.target + NEAR:
        return None
    tried = {least: low, most: high}
    for step in range(steps):
        if min(abs(density - way.target) for density in tried) <= GOOD:
            break
        share = 0.5 if step % 2 or most <= least else (way.target - least) / (most - least)
        middle = low + min(max(share, 0.05), 0.95) * (high - low)
        density = density_of(middle)
        tried.setdefault(density, middle)
        if density <= way.target:
            low, least = middle, density
        else:
            high, most = middle, density
    return tried[min(tried, key=lambda density: abs(density - way.target))]


def density_of_noise(way: Way, value: float, tokens: int, block: tuple[int, int]) -> float:
    """The density of one layer that attends noise: for rules whose density does not depend on what is attended.

    Computed on the CPU: kernels would be compiled anew for each value.
    """
    q, k, v = torch.randn(3, 1, tokens, 1, 64, generator=torch.Generator().manual_seed(0))
    spec = way.spec(value, block)
    lists = select_blocks(q, k, spec, v=v, causal=True)
    return float(make_call(q, k, v, spec, causal=True).stats(lists, "reference").density.mean())
