"""What is known of every pair of blocks of a sample, estimated as the rule `budget` does and measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from attention_judges.measure import Measuring

from psa_kernels import AttentionSpec
from psa_kernels.allocation.prices import COVARIANCE, EXPONENT, _prices, _spread, query_energy
from psa_kernels.blocks import as_blocks, group_means, group_sizes


@dataclass(frozen=True, eq=False)
class Pairs:
    """Terms of the error model of `psa_kernels/allocation/prices.py`, of the query blocks that the judge looks at.

    Attributes:
        mass: shares of attention, estimated: `[H, query blocks, key blocks]`.
        distance: squared, of a key block's mean value from the estimated output: of that shape.
        noise: variance of logits inside groups, for each pooled level: `[levels, H, query blocks, key blocks]`.
        spread: variance of values inside these groups: `[pooled levels, H, 1, key blocks]`.
    """

    mass: torch.Tensor
    distance: torch.Tensor
    noise: torch.Tensor
    spread: torch.Tensor


def pairs_of(measuring: Measuring, spec: AttentionSpec, order: str, importance: torch.Tensor) -> Pairs:
    """Estimates from importance `[1, H, query blocks, key blocks]` and from means and variances of the tokens."""
    s, rows = measuring.sample, slice(None, None, measuring.every)
    tokens = measuring.layout(order).video_query_tokens(s.q.device)
    queries, keys, values = (x[0, tokens].transpose(0, 1) for x in (s.q, s.k, s.v))
    mass = importance[0] / importance[0].sum(-1, keepdim=True)
    centres = group_means(values, spec.block_key)
    outputs = mass @ centres
    distance = outputs.square().sum(-1)[..., None] + centres.square().sum(-1)[..., None, :] - 2 * outputs @ centres.mT
    energy = query_energy(queries, spec)[:, rows] / queries.shape[-1]
    pooled = pooled_levels(spec)
    noise = torch.stack([energy @ _spread(keys, factor, spec.block_key).mT for factor in pooled])
    spread = torch.stack([_spread(values, factor, spec.block_key).sum(-1)[:, None] for factor in pooled])
    return Pairs(mass[:, rows], distance.clamp_min(0)[:, rows], noise, spread)


def pooled_levels(spec: AttentionSpec) -> tuple[int, ...]:
    """Pooling factors of the levels that pool; the first level has to be 1."""
    return spec.levels[1:]


def modelled_errors(
    pairs: Pairs,
    spec: AttentionSpec,
    exponent: float = EXPONENT,
    covariance: float = COVARIANCE,
    convexity: float = 0.25,
    skipping: float = 1.0,
) -> torch.Tensor:
    """Squared errors of each level and of skipping by `prices.py`: `[levels + 1, H, query blocks, key blocks]`.

    Args:
        exponent, covariance: E and c of `prices.py`.
        convexity, skipping: factors on its other two terms, there 1/4 and 1.
    """
    shares = torch.tensor(pooled_levels(spec))[:, None, None, None] / spec.block_key
    pooled = covariance * shares * pairs.noise * pairs.spread + convexity * pairs.noise.square() * pairs.distance
    errors = torch.cat([torch.zeros_like(pooled[:1]), pooled, skipping * pairs.distance[None]])
    return errors * pairs.mass**exponent


def prices_of(errors: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """int16 `[levels, 1, H, query blocks, key blocks]` from errors `[levels + 1, H, query blocks, key blocks]`."""
    return _prices(errors, spec)[:, None]


@dataclass(frozen=True, eq=False)
class Truth:
    """What replacing one block by means, or skipping it, does to the dense output, measured: nothing is estimated.

    Attributes:
        errors: squared change of the output, mean over the queries of a block, if this pair alone is pooled or
            skipped: `[levels + 1, H, query blocks, key blocks]`.
        mass: share of the attention, mean over the queries of a block: `[H, query blocks, key blocks]`.
        pooled_mass: the weight that the mean of a whole block has with ln(tokens) added, in shares of the same sum.
    """

    errors: torch.Tensor
    mass: torch.Tensor
    pooled_mass: torch.Tensor


def truth_of(measuring: Measuring, spec: AttentionSpec, order: str) -> Truth:
    """Of the query blocks that the judge looks at, head by head."""
    q, k, v, _ = measuring.in_order(order, spec.block_query)
    text, scale = measuring.sample.text_before, q.shape[-1] ** -0.5
    found = [_truth_of_head(q[0, text:, h] * scale, k[0, :, h], v[0, :, h], text, spec) for h in range(q.shape[2])]
    return Truth(*(torch.stack(each, dim) for each, dim in zip(zip(*found, strict=True), (1, 0, 0), strict=True)))


def _truth_of_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: int, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = q @ k.T
    top = logits.amax(-1, keepdim=True)
    rest = (logits[:, :text] - top).exp()
    sums, sizes = _of_blocks(q, k[text:], v[text:], 1, spec, top)
    total = sums.sum(1) + rest @ v[:text]
    weight = sizes.sum(1) + rest.sum(-1)
    output = total / weight[:, None]

    def change(new_sums: torch.Tensor | float, new_sizes: torch.Tensor | float) -> torch.Tensor:
        moved, grown = new_sums - sums, new_sizes - sizes
        moved = (moved - output[:, None] * grown[..., None]) / (weight[:, None] + grown)[..., None].clamp_min(1e-9)
        return _mean_of_blocks(moved.square().sum(-1), spec.block_query)

    errors = [torch.zeros(-(-len(q) // spec.block_query), sizes.shape[1])]
    errors += [change(*_of_blocks(q, k[text:], v[text:], factor, spec, top)) for factor in pooled_levels(spec)]
    errors.append(change(torch.zeros_like(sums), torch.zeros_like(sizes)))
    _, by_means = _of_blocks(q, k[text:], v[text:], spec.block_key, spec, top)
    shares = (_mean_of_blocks(each / weight[:, None], spec.block_query) for each in (sizes, by_means))
    return torch.stack(errors), *shares


def _of_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: int, spec: AttentionSpec, top: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each query and key block the weighted sum of values `[N, blocks, D]` and the sum of weights `[N, blocks]`."""
    keys, values = group_means(k, factor), group_means(v, factor)
    counts = group_sizes(len(k), factor, k.device).to(k.dtype)
    weights = as_blocks((q @ keys.T + counts.log() - top).exp(), spec.block_key // factor, -1)
    values = as_blocks(values, spec.block_key // factor, -2)
    return torch.einsum("nbg,bgd->nbd", weights, values), weights.sum(-1)


def _mean_of_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    return group_means(x, block)
