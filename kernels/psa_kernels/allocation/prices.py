"""What a finer level is worth, for every pair of blocks, in PyTorch.

Pooling keys that differ, or skipping a block, moves the output of the attention. Let a block hold the share m of a
query's attention. Inside groups of p tokens let its logits have the variance `noise` and its values the variance
`spread`, and let its mean value lie `distance` from the output. Then the squared error is, to second order,

    pooled p-fold   m^2 (c p / block_key noise * spread + (noise * distance)^2 / 4)
    skipped         m^2 distance^2

The variance of logits is estimated from the queries that represent a block in the importance. The first term is the
covariance of weights and values that a mean loses, in `block_key / p` groups that err independently. The second is the
weight that a group loses because exp is convex. A price is the error that a finer level saves for each unit of cost
that it adds.

Some constants differ from this theory. Those of the error model `tuned` brought videos of the demo model closest to the
dense ones: c is 16, while independent groups would have at most 1, because their errors are not independent; and m has
the exponent 1.4, because it is only an estimate. Those of `fitted` save most of the measured errors of blocks of three
trained models; docs/quality/learned.md says how.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from psa_kernels.blocks import compute_dtype, group_means
from psa_kernels.heads import group_size, key_heads
from psa_kernels.layout import TokenLayout
from psa_kernels.spec import AttentionSpec
from psa_kernels.threads import run_tasks

# Prices are fixed-point logarithms: steps of 1/256 of an octave, 64 octaves down and up from 1.
STEPS_PER_OCTAVE = 256
HIGHEST_PRICE = 128 * STEPS_PER_OCTAVE - 1
COVARIANCE = 16.0
EXPONENT = 1.4


class ErrorModel(NamedTuple):
    """Constants of the error model: the exponent of m, c, and the factor 1/4 on noise^2 distance^2."""

    exponent: float
    covariance: float
    convexity: float


ERROR_MODELS = {"tuned": ErrorModel(EXPONENT, COVARIANCE, 0.25), "fitted": ErrorModel(2.3, 2.0, 0.06)}
TOKENS_AT_ONCE = 1 << 19


def upgrade_prices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    importance: torch.Tensor,
    layout: TokenLayout,
    spec: AttentionSpec,
    scale: float,
    lead: int = 0,
) -> torch.Tensor:
    """At which price of cost each level of each pair of blocks pays.

    Args:
        q, k, v: `[B, Nq, Hq, D]` and twice `[B, Nk, Hkv, D]`, all tokens, in the order of the model.
        importance: `[B, Hq, query blocks, key blocks]`; shares of its sums over a row stand for m.
        scale: factor on the dot products.
        lead: of `query_energy`.

    Returns:
        int16 `[levels, B, Hq, query blocks, key blocks]`, from 0 to `HIGHEST_PRICE`: entry l is the logarithm of the
        highest price at which level l or a finer one is the best choice. It does not decrease from level to level, so
        that at a price of x a pair gets the level whose number is the count of its entries below x.
    """
    prices = torch.empty(len(spec.levels), *importance.shape, dtype=torch.int16, device=q.device)
    query_tokens, key_tokens = layout.video_query_tokens(q.device), layout.video_key_tokens(k.device)
    group = group_size(q, k)
    heads = heads_at_once(q.is_cuda, group, len(key_tokens))

    def worker(tasks: Iterator[tuple[int, int]]) -> None:
        for b, first in tasks:
            part = slice(first, min(first + heads, q.shape[2]))
            of_keys = key_heads(part, group)
            queries, keys, values = (
                x[b, :, read].index_select(0, tokens).transpose(0, 1).to(compute_dtype(x))
                for x, read, tokens in ((q, part, query_tokens), (k, of_keys, key_tokens), (v, of_keys, key_tokens))
            )
            # Heads of the queries beside those of the keys that they read: `[Hkv, heads that share one, ...]`.
            shared = len(keys), -1
            queries, mass = queries.unflatten(0, shared), importance[b, part].unflatten(0, shared)
            # The scale goes to the queries, so that what comes of them are variances of logits.
            errors = _errors(queries * scale, keys[:, None], values[:, None], mass, spec, lead)
            prices[:, b, part] = _prices(errors, spec).flatten(1, 2)

    run_tasks(product(range(q.shape[0]), range(0, q.shape[2], heads)), worker, q.device)
    return prices


def heads_at_once(on_gpu: bool, group: int, key_tokens: int) -> int:
    """Heads of the queries that are priced at a time, where so many share one of the keys.

    One on a CPU, where threads share them; on a GPU so many that its launches are worth while, in whole groups.
    """
    return group * max(1, TOKENS_AT_ONCE // (group * key_tokens)) if on_gpu else 1


def _errors(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    importance: torch.Tensor,
    spec: AttentionSpec,
    lead: int = 0,
) -> torch.Tensor:
    """Squared error of each level, and last of what `rest` does: `[levels + 1, ..., query blocks, key blocks]`.

    Args:
        queries, keys, values: `[..., N, D]` each, whose leading dimensions are broadcast.
        importance: `[..., query blocks, key blocks]`.
        lead: of `query_energy`.
    """
    model = ERROR_MODELS[spec.error_model]
    mass = importance.to(keys.dtype)
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    centres = group_means(values, spec.block_key)
    outputs = mass @ centres
    distance = outputs.square().sum(-1)[..., None] + centres.square().sum(-1)[..., None, :] - 2 * outputs @ centres.mT
    distance = distance.clamp_min(0)
    energy = query_energy(queries, spec, lead)
    errors = []
    for factor in spec.factors:
        noise = energy @ _spread(keys, factor, spec.block_key).mT
        spread = _spread(values, factor, spec.block_key).sum(-1)[..., None, :]
        covariance = model.covariance * factor / spec.block_key
        errors.append(covariance * noise * spread + noise.square() * distance * model.convexity)
    if spec.rest == "skip":
        errors.append(distance)
    return torch.stack(errors) * mass**model.exponent


def energy_stride(spec: AttentionSpec) -> int:
    """One of how many queries tells the energy of a block: those that importance samples, or all where it pools."""
    return spec.importance.query_stride if spec.importance.estimator == "sampled" else 1


def query_energy(queries: torch.Tensor, spec: AttentionSpec, lead: int = 0) -> torch.Tensor:
    """Mean square, per channel, of the queries that tell the energy of each block: `[..., N, D]` to `[..., blocks, D]`.

    Args:
        lead: how many tokens stand before the first query in its block, which is the only one if they are not 0. The
            first query of every `energy_stride` tokens is read, counted from the begin of the block.
    """
    stride = energy_stride(spec)
    cut = -lead % stride
    read = queries[..., cut::stride, :]
    if cut:
        read = torch.cat([queries[..., :1, :], read], dim=-2)
    return group_means(read.square(), spec.block_query // stride)


def _spread(tokens: torch.Tensor, factor: int, block: int) -> torch.Tensor:
    """Variance inside groups of `factor` neighbours, mean over each block: `[..., N, D]` to `[..., blocks, D]`."""
    means = group_means(tokens, factor).repeat_interleave(factor, dim=-2)[..., : tokens.shape[-2], :]
    return group_means((tokens - means).square(), block)


def _prices(errors: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """From errors `[levels + 1, ...]` to prices `[levels, ...]`: slopes of the lower convex hull of error over cost."""
    costs = [1 / factor for factor in spec.levels] + [1 / spec.block_key if spec.rest == "mean" else 0.0]
    prices = []
    for level in range(len(spec.levels)):
        # The level is worth its cost as long as it is against every coarser choice.
        slopes = [
            (errors[other] - errors[level]) / (costs[level] - costs[other])
            for other in range(level + 1, len(costs))
            if costs[level] > costs[other]
        ]
        prices.append(torch.stack(slopes).amin(0) if slopes else torch.zeros_like(errors[0]))
    steps = torch.stack(prices).log2().mul(STEPS_PER_OCTAVE).floor().add(HIGHEST_PRICE // 2)
    # Last, so that prices do not decrease where errors are not finite either.
    return steps.nan_to_num(nan=0.0, neginf=0.0).clamp(0, HIGHEST_PRICE).cummax(0).values.to(torch.int16)
