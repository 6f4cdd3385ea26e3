"""What the tests of the kernels on a GPU have in common."""

import random

import torch

from psa_kernels import AttentionSpec


def poison_free_memory() -> None:
    """Leave NaN in the memory that the next tensors are likely to get."""
    kept = [torch.full((size,), torch.nan, device="cuda") for size in (1 << 18, 1 << 20, 1 << 22) for _ in range(8)]
    del kept


def surrounded(
    shape: tuple[int, int, int, int], dtype: torch.dtype, headwise: bool, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN, and a view into it of random numbers.

    Args:
        shape: of the view, `[B, N, H, D]`.
        headwise: whether the tokens of a head lie side by side, else the heads of a token.
        first: else, how many channels of NaN stand before each row, of 5 beside it.
    """
    batch, tokens, heads, head_dim = shape
    if headwise:
        wide = torch.full((batch, heads, tokens + 3, head_dim), torch.nan, dtype=dtype, device="cuda")
        view = wide[:, :, 2:-1].transpose(1, 2)
    else:
        wide = torch.full((batch, tokens, heads, head_dim + 5), torch.nan, dtype=dtype, device="cuda")
        view = wide[..., first : first + head_dim]
    return wide, view.copy_(torch.randn(shape, device="cuda"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of `expected`, which is float64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def random_call(
    chance: random.Random,
) -> tuple[int, AttentionSpec, int, int, int, int, torch.Tensor | None]:
    """A call that the kernel for Hopper serves.

    Returns:
        head_dim; the spec; tokens of text before and after the video; video queries; video keys; the permutation.
    """
    head_dim, block_key = chance.choice([64, 128]), chance.choice([32, 64, 128])
    fitting = [factor for factor in (1, 2, 4, 8, 16) if block_key // factor >= 8]
    levels = sorted(chance.sample(fitting, chance.randint(1, len(fitting))))
    thresholds = tuple(i / len(levels) for i in range(1, len(levels) + 1))
    spec = AttentionSpec(block_query=128, block_key=block_key, levels=tuple(levels), thresholds=thresholds)
    before, after = chance.choice([(0, 0), (0, 0), (226, 0), (0, 77), (5, 300), (64, 128)])
    video = chance.choice([chance.randint(1, 3000), 128 * chance.randint(2, 10)])
    keys = chance.choice([video, chance.randint(1, 3000)])
    permutation = torch.randperm(video, device="cuda") if keys == video and chance.random() < 0.5 else None
    return head_dim, spec, before, after, video, keys, permutation
