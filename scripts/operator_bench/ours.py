"""The operator and its stages, by the portable kernels and the one for Hopper, or by both in two precisions.

Tokens are in raster order; `psa-hopper-hilbert` is the whole operator with those of the video along a Hilbert curve.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from operator_bench.workloads import LEVELS, THRESHOLDS, Case, Workload, skip

from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import AttentionSpec, AttentionStats, Importance, psa_attention
from psa_kernels.backends.hopper import Hopper
from psa_kernels.backends.triton_int8 import TritonInt8
from psa_kernels.call import make_call


def cases(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workload: Workload, options: argparse.Namespace
) -> Iterator[Case]:
    """Every stage and the whole at every density, the dense one too."""
    for spec in specs(options):
        yield from _stages(q, k, v, workload, spec, options.precision == "int8_qk")


def specs(options: argparse.Namespace) -> list[AttentionSpec]:
    """One for each density; importance is estimated as the operator does by default, unless told otherwise."""
    wanted = {name: getattr(options, name) for name in ("estimator", "statistic", "query_stride", "key_stride")}
    told = {name: value for name, value in wanted.items() if value is not None}
    importance = dataclasses.replace(AttentionSpec().importance, **told)
    if options.rule == "budget":
        return [
            AttentionSpec(
                block_key=options.block_key, levels=LEVELS, rule="budget", density=density, importance=importance
            )
            for density in THRESHOLDS
        ]
    allocations = [*((LEVELS, thresholds) for thresholds in THRESHOLDS.values()), ((1,), (1.0,))]
    return [
        AttentionSpec(block_key=options.block_key, levels=levels, thresholds=thresholds, importance=importance)
        for levels, thresholds in allocations
    ]


def describe(importance: Importance) -> str:
    return f"{importance.estimator}, {importance.query_stride} x {importance.key_stride}, {importance.statistic}"


def _stages(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, workload: Workload, spec: AttentionSpec, int8: bool
) -> Iterator[Case]:
    """Each stage is given what the stages before it return."""
    from psa_kernels.allocation.triton import allocate
    from psa_kernels.allocation.triton_budget import allocate_budget
    from psa_kernels.allocation.triton_prices import upgrade_prices
    from psa_kernels.importance.triton import block_importance
    from psa_kernels.pyramid.triton import build_pyramid
    from psa_kernels.quantise.triton import quantise_as_read, quantise_rows
    from psa_kernels.sparse import triton as portable
    from psa_kernels.sparse import triton_int8 as portable_int8

    call = make_call(q, k, v, spec, text_after=workload.text)
    layout, scale = call.layout, call.scale
    attend: dict[str, Callable[..., object]] = {"triton": portable.sparse_attention}
    obstacle = Hopper().why_not(call)
    if obstacle is None:
        from psa_kernels.sparse.hopper import launch as hopper

        attend["hopper"] = hopper.sparse_attention
    else:
        skip("psa-hopper", obstacle)

    pyramid = build_pyramid(k, v, layout, spec)
    importance = block_importance(q, k, layout, spec, scale)
    price = partial(upgrade_prices, q, k, v, importance, layout, spec, scale)
    allocate_rows = partial(allocate, importance, None, spec)
    if spec.rule == "budget":
        allocate_rows = partial(allocate_budget, price(), importance, spec)
    lists = allocate_rows()
    quantise: dict[str, Callable[[], Any]] = {}
    if int8:
        obstacle = TritonInt8().why_not(call)
        if obstacle is None:
            quantise["triton-int8"] = partial(quantise_as_read, q, pyramid, layout, spec, scale)
            attend["triton-int8"] = partial(portable_int8.sparse_attention, integers=quantise["triton-int8"]())
        else:
            skip("psa-triton-int8", obstacle)
        if "hopper" in attend:
            quantise["hopper-int8"] = partial(quantise_rows, q, pyramid, layout, spec, scale)
            attend["hopper-int8"] = partial(hopper.sparse_attention, integers=quantise["hopper-int8"]())
    density = AttentionStats.from_lists(lists, spec, "").density.mean().item()
    both = tuple(f"psa-{name}" for name in attend)
    yield Case(both, density, "pyramid", partial(build_pyramid, k, v, layout, spec))
    yield Case(both, density, "importance", partial(block_importance, q, k, layout, spec, scale))
    if spec.rule == "budget":
        yield Case(both, density, "prices", price)
    yield Case(both, density, "allocation", allocate_rows)
    for name, sparse_attention in attend.items():
        method = (f"psa-{name}",)
        precision = "int8_qk" if name in quantise else "native"
        if name in quantise:
            yield Case(method, density, "quantise", quantise[name])
        yield Case(method, density, "attention", partial(sparse_attention, q, pyramid, lists, layout, spec, scale))
        whole = partial(
            psa_attention, q, k, v, dataclasses.replace(spec, precision=precision), text_after=workload.text,
            implementation=name.removesuffix("-int8"),
        )  # fmt: skip
        yield Case(method, density, "total", whole)
        if name == "hopper" and not int8:
            permutation = token_permutation("hilbert", workload.grid).to(q.device)
            yield Case(("psa-hopper-hilbert",), density, "total", partial(whole, permutation=permutation))
