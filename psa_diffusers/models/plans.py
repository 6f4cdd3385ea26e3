"""The words of diffusers' plans for context parallelism, which it keeps in a private module.

Should that module move, only runs on several GPUs fail, and this is the place to name the new one.
"""

from __future__ import annotations

from typing import Any


def split(dim: int, dims: int, *, output: bool = False) -> Any:
    """A tensor of `dims` dimensions of which each rank gets a part along `dim`: an argument, or an output."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=output)


def gather(dim: int, dims: int) -> Any:
    """An output of `dims` dimensions that is joined along `dim`."""
    from diffusers.models._modeling_parallel import ContextParallelOutput

    return ContextParallelOutput(gather_dim=dim, expected_dims=dims)
