"""Time the rotation of queries and keys by positions: `python scripts/bench_rotation.py --output rotation.json`.

Needs a CUDA device. Queries and keys of one layer, as the model family's eager path turns them: by the kernel, and by
complex products in float32, which is what runs where there is no kernel. Times are means of Triton's `do_bench`; TB/s
are bytes read and written by the kernel, without the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import publish
from triton.testing import do_bench

from psa_diffusers.families.rotation import Rotation
from psa_kernels.backends import triton as portable

# Tokens, heads, head_dim of Wan2.1-14B at 720p, Wan2.1-1.3B at 480p, CogVideoX-5B, and a short video.
SHAPES = ((75_600, 40, 128), (32_760, 12, 128), (17_550, 48, 64), (5_184, 8, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: none")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_rotation: no CUDA device")
    rows = [row_of(*shape) for shape in SHAPES]
    what = "rotation of queries and keys of one layer, bfloat16, random inputs, means"
    publish(what, rows, options.output, device="cuda", commit=options.commit)


@torch.no_grad()
def row_of(tokens: int, heads: int, head_dim: int) -> dict[str, Any]:
    """Milliseconds of both ways for one shape."""
    query, key = torch.randn(2, 1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    angles = torch.rand(1, tokens, 1, head_dim // 2, device="cuda").repeat_interleave(2, -1)
    tables = angles.cos(), angles.sin()

    def turn() -> Callable[[], tuple[torch.Tensor, ...]]:
        rotate = Rotation(lambda cos, sin: (cos[..., 0::2], sin[..., 1::2]))
        return lambda: tuple(rotate(tables, x) for x in (query, key))

    by_kernel, by_products = turn(), turn()
    ms = do_bench(by_kernel)
    with mock.patch.object(portable, "has_kernels", lambda device: False):
        complex_ms = do_bench(by_products)
    moved = 2 * 2 * query.numel() * query.element_size()
    row = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "ms": round(ms, 3)}
    row |= {"tb_per_s": round(moved / ms / 1e9, 2), "complex_ms": round(complex_ms, 3)}
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
