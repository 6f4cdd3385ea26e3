"""Attention by others, as far as it is importable: dense, and sparse at the same densities.

- `sdpa-fa2`, `sdpa-cudnn`: PyTorch's backends; `flex`: its FlexAttention with a block mask that is given for free.
- `fa3`: `fa3_fwd_interface` of the wheel fa3-fwd.
- `psa-authors`: `psa_triton` of ziplab/Pyramid-Sparse-Attention, only at key block 128, where its kernel is right.
- `sol-int8`: `sol_attn` of the package comfy-kitchen.
- `sol-attn`: `sol_kernel` of Saganaki22/ComfyUI-sol-attn, a port of Sol-Attn's Triton path.

All but ours treat text like video.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from operator_bench import sol_int8
from operator_bench.workloads import LEVELS, THRESHOLDS, Case, skip
from torch.nn.attention import SDPBackend, sdpa_kernel

Maker = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Iterator[Case]]
TILE = 128
# The paper's default and the port's.
SOL_TAUS = (1.0, 1.3)
SOL_BLOCK = 64


def dense_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    """Dense peers, all on the caller's `[B, N, H, D]`."""
    yield from _cases({"sdpa-fa2": _fa2, "sdpa-cudnn": _cudnn, "fa3": _fa3}, q, k, v)


def sparse_cases(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    """Sparse peers, each on the layout that it wants."""
    yield from _cases({"flex": _flex, "psa-authors": _authors, "sol-int8": _sol_int8, "sol-attn": _sol}, q, k, v)


def versions() -> dict[str, str]:
    """Of the peers that are installed as packages and are not among what every benchmark names."""
    found = {}
    for name in ("fa3-fwd", "comfy-kitchen", "minference"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _cases(makers: dict[str, Maker], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    for name, make in makers.items():
        try:
            yield from make(q, k, v)
        except ImportError as error:
            skip(name, str(error))
        except Exception as error:
            yield Case((name,), None, "total", partial(_raise, error))


def _raise(error: Exception) -> None:
    raise error


def _fa2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    yield Case(("sdpa-fa2",), 1.0, "total", partial(_sdpa, SDPBackend.FLASH_ATTENTION, q, k, v))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    yield Case(("sdpa-cudnn",), 1.0, "total", partial(_sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v))


def _sdpa(backend: SDPBackend, *qkv: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))


def _fa3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    flash_attn_func = importlib.import_module("fa3_fwd_interface").flash_attn_func
    yield Case(("fa3",), 1.0, "total", partial(flash_attn_func, q, k, v))


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    from torch.nn.attention.flex_attention import BlockMask

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    blocks = math.ceil(q.shape[1] / TILE)
    for nominal in THRESHOLDS:
        kept = max(1, round(nominal * blocks))
        chosen = torch.rand(blocks, blocks, device=q.device).argsort(-1)[:, :kept].sort(-1).values
        ids = F.pad(chosen, (0, blocks - kept))[None, None].int()
        counts = torch.full((1, 1, blocks), kept, dtype=torch.int32, device=q.device)
        # Only whole blocks: none needs a mask inside.
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(counts), torch.zeros_like(ids), counts, ids, BLOCK_SIZE=TILE, seq_lengths=(q.shape[1],) * 2
        )
        yield Case(("flex",), kept / blocks, "total", partial(_compiled_flex(), *heads_first, block_mask=mask))


@cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Compiled for each shape: a kernel for any shape would be slower.
    return torch.compile(flex_attention, dynamic=False)


def _authors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    package = importlib.import_module("psa_triton")
    # Their code makes such copies where they are missing; they are not counted here.
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    for thresholds in THRESHOLDS.values():
        config = package.PSAConfig(
            block_m=TILE, block_n=TILE, tile_n=32, mask_ratios=authors_ratios(thresholds), mask_mode="topk"
        )
        call = partial(package.PSAAttention(config), *heads_first)
        yield Case(("psa-authors",), authors_density(thresholds, math.ceil(q.shape[1] / TILE)), "total", call)


def authors_ratios(thresholds: tuple[float, ...]) -> dict[int, tuple[float, float]]:
    """Shares as their configuration has them. It needs an entry for level 8: levels are told apart by position."""
    bounds = (0.0, *thresholds)
    ratios = {level: (bounds[index], bounds[index + 1]) for index, level in enumerate(LEVELS)}
    return {**ratios, 8: (bounds[-1], bounds[-1]), 0: (bounds[-1], 1.0)}


def authors_density(thresholds: tuple[float, ...], blocks: int) -> float:
    """Their `topk` rounds every bound down to whole blocks."""
    ends = [0, *(int(blocks * threshold) for threshold in thresholds)]
    return sum((ends[index + 1] - ends[index]) / level for index, level in enumerate(LEVELS)) / blocks


def _sol_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    if q.shape[-1] != sol_int8.HEAD_DIM:
        raise ImportError(f"head_dim={q.shape[-1]}: expected {sol_int8.HEAD_DIM}")
    for rule in sol_int8.RULES:
        call = rule((q, k, v))
        call()  # says so if it cannot run here
        yield Case(("sol-int8",), rule.density(q, k), "total", call)


def _sol(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    sol_attn = importlib.import_module("sol_kernel").sol_attn
    for tau in SOL_TAUS:
        call = partial(sol_attn, q, k, v, tau=tau)
        call()  # says so if it does not support the shape
        yield Case(("sol-attn",), _sol_density(q, k, v, tau), "total", call)


def _sol_density(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: float) -> float:
    """Share of pairs of blocks that it attends exactly, by the rule of its kernel; the rest it approximates.

    Exact are blocks whose mean score exceeds the threshold of the query block, and those beside the diagonal.
    """
    scale = q.shape[-1] ** -0.5
    prepare = importlib.import_module("sol_kernel.preprocess").prepare
    key_means, _, threshold = prepare(q, k, v, scale=scale, tau=tau)
    blocks = key_means.shape[1]
    index = torch.arange(blocks, device=q.device)
    beside = (index[:, None] - index).abs() <= 1
    sizes = (q.shape[1] - index * SOL_BLOCK).clamp(max=SOL_BLOCK)
    exact = torch.zeros((), device=q.device)
    for head in range(q.shape[2]):
        queries = F.pad(q[0, :, head].float(), (0, 0, 0, -q.shape[1] % SOL_BLOCK))
        means = queries.view(blocks, SOL_BLOCK, -1).sum(1) / sizes[:, None]
        scores = means @ key_means[0, :, head].float().T * (scale * math.log2(math.e))
        exact += ((scores > threshold[0, :, head, None]) | beside).float().mean()
    return (exact / q.shape[2]).item()
