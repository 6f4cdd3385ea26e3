"""What this package uses of diffusers beyond its public interface, in one place.

Each name is looked up when it is needed and has a way out, so that a diffusers that moved it costs a feature rather
than the import.

- `module._diffusers_hook.hooks[...]._is_stateful` tells whether a cache of blocks is on. If it moves, only caches that
  were switched on by `enable_cache` are seen.
- `transformer._is_cached` tells the same of the package cache-dit. If it moves, such a cache goes unnoticed.
- `pipe._num_timesteps` is the number of steps of a run that skips the first ones. If it moves, the scheduler's is
  taken, and the dense phase of video-to-video runs is too long.
- `diffusers.models._modeling_parallel` has the words of plans for context parallelism, `transformer._cp_plan` is a plan
  of diffusers, `transformer._parallel_config` what was enabled, and its `_ulysses_mesh` the group of ranks. If one of
  them moves, runs that several GPUs share fail, and only these; the new one is to be named here.
- `pipe._blocks` are the blocks that a modular pipeline runs; `pipe.blocks` is a copy of them. If it moves, the progress
  bars of modular pipelines are as diffusers draws them.
- `transformer._diffusers_hook.hooks[...].metadata` names the arguments that context parallelism splits. If it moves,
  LTX-Video in context parallel is refused.

`processor._attention_backend` and `processor._parallel_config` are written by diffusers (`set_attention_backend`,
`enable_parallelism`) on processors that have them. `PSAProcessor` declares both and hands them on to the processors
that it stands for. If they move, those two calls no longer reach the dense phase.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keeps_state_between_forwards(transformer: torch.nn.Module) -> bool:
    """Whether something on the transformer keeps values of one forward for the next: a cache of blocks or attention."""
    if getattr(transformer, "is_cache_enabled", False) or getattr(transformer, "_is_cached", False):
        return True
    for module in transformer.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hooks = getattr(registry, "hooks", None) or {}
        if any(getattr(hook, "_is_stateful", False) for hook in hooks.values()):
            return True
    return False


def split(dim: int, dims: int, *, output: bool = False) -> Any:
    """Of a plan: an argument, or an output, of `dims` dimensions, of which each rank gets a part along `dim`."""
    from diffusers.models._modeling_parallel import ContextParallelInput

    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=output)


def gather(dim: int, dims: int) -> Any:
    """Of a plan: an output of `dims` dimensions that is joined along `dim`."""
    from diffusers.models._modeling_parallel import ContextParallelOutput

    return ContextParallelOutput(gather_dim=dim, expected_dims=dims)


def own_plan(transformer: torch.nn.Module) -> dict[str, Any] | None:
    """diffusers' own plan for the context parallelism of a model; None if it has none."""
    return getattr(transformer, "_cp_plan", None)


def parallel_config(transformer: torch.nn.Module) -> Any | None:
    """What `enable_parallelism` was given; None on one device."""
    return getattr(transformer, "_parallel_config", None)


def ulysses_group(config: Any) -> tuple[Any, int]:
    """The process group that shares the heads, and this process's place in it, of a `ContextParallelConfig`."""
    mesh = config._ulysses_mesh
    return mesh.get_group(), mesh.get_local_rank()


def split_arguments(transformer: torch.nn.Module) -> set[str]:
    """Names of the arguments of the transformer's forward that context parallelism splits."""
    hooks = getattr(transformer.__dict__.get("_diffusers_hook"), "hooks", None) or {}
    plans = [getattr(hook, "metadata", None) for hook in hooks.values()]
    return {name for plan in plans if isinstance(plan, dict) for name in plan if isinstance(name, str)}


def inner_blocks(pipe: Any) -> list[Any]:
    """The blocks of a modular pipeline, and those in them."""
    found = [getattr(pipe, "_blocks", None)]
    for block in found:
        found += getattr(block, "sub_blocks", {}).values()
    return found


def step_count(pipe: Any, timesteps: torch.Tensor) -> int:
    """How many of the scheduler's timesteps a run has: a video-to-video run uses only the last ones."""
    return min(getattr(pipe, "_num_timesteps", None) or len(timesteps), len(timesteps))
