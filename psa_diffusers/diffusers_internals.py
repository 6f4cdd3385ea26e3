"""What this package uses of diffusers beyond its public interface, in one place.

Each name is looked up when it is needed, and a missing one costs a feature rather than the import.

- `module._diffusers_hook.hooks[...]._is_stateful` tells whether a cache of blocks is on. If it moves, only caches that
  were switched on by `enable_cache` are seen.
- `transformer._is_cached` tells the same of the package cache-dit. If it moves, such a cache goes unnoticed.
- `attn._diffusers_hook.hooks[...].skip_attention_scores` tells that a guider (perturbed attention guidance) has values
  in place of attention: within that hook `scaled_dot_product_attention` gives back its values, and no other operator
  does. If it moves, sparse layers attend where they should not in the forwards that such a guider perturbs.
- `diffusers.hooks._helpers.AttentionProcessorRegistry` has, by the class of an attention module's processor, what such
  guiders must know of it. If it moves, they refuse a patched transformer, as they do most models.
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
`enable_parallelism`) on processors that have them. `PSAProcessor` declares both and passes them on to the processors
that it replaced. If they move, those two calls no longer reach the dense phase.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keeps_state_between_forwards(transformer: torch.nn.Module) -> bool:
    """Whether something on the transformer keeps values of one forward for the next: a cache of blocks or attention."""
    if getattr(transformer, "is_cache_enabled", False) or getattr(transformer, "_is_cached", False):
        return True
    return any(getattr(hook, "_is_stateful", False) for module in transformer.modules() for hook in _hooks_of(module))


def skips_attention_scores(attn: torch.nn.Module) -> bool:
    """Whether a guider has the module give its values in place of attention in this forward."""
    return any(getattr(hook, "skip_attention_scores", False) for hook in _hooks_of(attn))


def _hooks_of(module: torch.nn.Module) -> Iterable[Any]:
    """diffusers' own hooks on a module."""
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", None) or {}
    return hooks.values()


def let_guiders_find(processor: type, original: Callable[[Any], Any]) -> None:
    """Let guiders that skip attention treat a class of processors as they treat the ones that it replaced.

    Args:
        original: the processor that a module had before, from the module.
    """
    try:
        from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
    except ImportError:
        return

    def skipped(attn: Any, *args: Any, **kwargs: Any) -> Any:
        known = AttentionProcessorRegistry.get(type(original(attn)))
        return known.skip_processor_output_fn(attn, *args, **kwargs)

    # Its own method would import all models that diffusers knows there.
    AttentionProcessorRegistry._registry.setdefault(processor, AttentionProcessorMetadata(skipped))


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
    plans = [getattr(hook, "metadata", None) for hook in _hooks_of(transformer)]
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
