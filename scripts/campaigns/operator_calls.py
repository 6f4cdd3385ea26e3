"""Random calls of the operator against float64: shapes, dtypes, strides, specs, text, orders.

    python scripts/campaigns/operator_calls.py --rounds 10000
    python scripts/campaigns/operator_calls.py --rounds 10000 --device cuda

On a CPU in float64 against the maths written down token by token (psa_testing/brute_force.py), and in a narrower
dtype against the reference in float64 with the same lists. On a GPU every kernel that serves the call, like the latter.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from rounds import campaign, parser

from psa_kernels import AttentionSpec, Importance, psa_attention, select_blocks
from psa_testing.brute_force import brute_force

ROOT = Path(__file__).resolve().parents[2]

# Relative errors of a whole output; dense attention in these dtypes has about half of them.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random_spec(chance: random.Random, device: str) -> AttentionSpec:
    """Any spec of small blocks on a CPU, one that kernels serve on a GPU."""
    wide = device != "cpu"
    block_key = chance.choice([16, 32, 64, 128] if wide else [2, 4, 6, 8, 12, 16])
    factors = [
        factor for factor in (1, 2, 3, 4, 6, 8, 16) if block_key % factor == 0 and not (wide and factor in (3, 6))
    ]
    levels = sorted(chance.sample(factors, chance.randint(1, min(4, len(factors)))))
    block_query = chance.choice([64, 128] if wide else [1, 3, 8, 16])
    strides = [[n for n in (1, 2, 4, 8) if block % n == 0] for block in (block_query, block_key)]
    thresholds = sorted(chance.choice([chance.random(), chance.random(), 1.0, 0.0]) for _ in levels)
    return AttentionSpec(
        block_query=block_query,
        block_key=block_key,
        levels=tuple(levels),
        thresholds=(*thresholds[:-1], max(thresholds[-1], 0.01)),
        rule=chance.choice(["count", "mass"]),
        floor=chance.choice([0.0, 0.1, chance.random()]),
        similarity=chance.choice([None, tuple(chance.uniform(-0.2, 0.5) for _ in levels[1:])]),
        importance=Importance(
            chance.choice(["sampled", "pooled"]),
            chance.choice(["max", "mean"]),
            chance.choice(strides[0]),
            chance.choice(strides[1]),
        ),
        rest=chance.choice(["skip", "mean"]),
    )


def random_tensors(chance: random.Random, shapes: list[tuple[int, ...]], device: str) -> list[torch.Tensor]:
    """Float64 `[B, N, H, D]` of any strides that the operator takes: heads before tokens, gaps between rows."""
    made = []
    for batch, tokens, heads, width in shapes:
        gap = chance.choice([0, 0, 8])
        if chance.random() < 0.5:
            x = torch.randn(batch, heads, tokens, width + gap, dtype=torch.float64, device=device).transpose(1, 2)
        else:
            x = torch.randn(batch, tokens, heads, width + gap, dtype=torch.float64, device=device)
        made.append(chance.choice([0.5, 1.5, 4.0]) * x[..., :width])
    return made


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(seed: int, device: str = "cpu") -> str:
    """One random call; the word is the dtype that it was computed in, besides float64."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    spec = random_spec(chance, device)
    wide = device != "cpu"
    most, head_dims = (2000, [40, 64, 96, 128]) if wide else (50, [1, 3, 8, 16])
    before, after = chance.choice([(0, 0), (0, 0), (3, 0), (0, 5), (2, 4)])
    video = chance.randint(1, most)
    keys = video if chance.random() < 0.6 else chance.randint(1, most)
    batch, heads, width = chance.choice([1, 2]), chance.choice([1, 3]), chance.choice(head_dims)
    shapes = [(batch, n + before + after, heads, width) for n in (video, keys, keys)]
    q, k, v = random_tensors(chance, shapes, device)
    scale = chance.choice([None, None, 0.3])
    permutation = torch.randperm(video, device=device) if keys == video and chance.random() < 0.5 else None
    options = {"text_before": before, "text_after": after, "permutation": permutation, "scale": scale}
    copies = [x.clone() for x in (q, k, v)]

    if not wide:
        out, stats = psa_attention(q, k, v, spec, return_stats=True, **options)
        expected, density = brute_force(q, k, v, spec, **options)
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(stats.density.double(), density, rtol=1e-6, atol=1e-6)

    dtype = chance.choice([torch.float16, torch.bfloat16] + ([] if wide else [torch.float32]))
    narrow = [x.to(dtype) for x in (q, k, v)]  # keeps the strides
    for name in ("triton", "hopper") if wide else ("reference",):
        try:
            lists = select_blocks(*narrow[:2], spec, implementation="triton" if wide else "reference", **options)
            out = psa_attention(*narrow, spec, implementation=name, lists=lists, **options)
        except ValueError as error:
            if "implementation=" not in str(error):
                raise
            continue  # the kernel does not serve this call, and said so
        exact = [x.double() for x in narrow]
        expected = psa_attention(*exact, spec, implementation="reference", lists=lists, **options)
        error = relative_error(out, expected)
        assert out.isfinite().all() and error < TOLERANCE[dtype], f"{name}, {dtype}: relative error {error:.2e}"
        again = psa_attention(*narrow, spec, implementation=name, lists=lists, **options)
        assert torch.equal(again, out), f"{name}: two calls differ"
    assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True)), "inputs were changed"
    return str(dtype).removeprefix("torch.")


def main() -> int:
    options = parser(__doc__, 1000)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options = options.parse_args()
    return campaign(lambda seed: check(seed, options.device), options)


if __name__ == "__main__":
    sys.exit(main())
