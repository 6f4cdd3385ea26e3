"""Video tokens in the order of the blocks for a whole forward, so that no layer has to put them there.

All that a transformer does to its tokens between their embedding and the output, it does to each by itself; only
attention looks at several, and where they stand is told by the rotary tables. So tokens and tables are put into the
order of the blocks where they come into being, and the output back into the order of the video. That is done where all
sparse layers of the forward want the same order, and where nothing could notice the other one: no cache that compares
or adds what it kept of another step, no other rank, no forward or hook of another's, no graph that the hooks would end
in.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch

from psa_diffusers.diffusers_internals import has_own_forward, keeps_state_between_forwards, parallel_config
from psa_diffusers.families import TokenPath
from psa_diffusers.patch.step import DenoisingStep, Grid
from psa_diffusers.presets import TokenOrder

Permutations = Callable[[TokenOrder, Grid, torch.device], torch.Tensor | None]


class Reordering:
    """Hooks on a transformer that put its video tokens into another order, in the forwards that `begin` tells.

    Args:
        transformer: is not kept alive.
        path: where its tokens come into being and where they end; None if they can only stay as they are.
        permutations: the order's permutation of a grid's tokens, on a device.
    """

    def __init__(self, transformer: torch.nn.Module, path: TokenPath | None, permutations: Permutations) -> None:
        self._transformer = weakref.ref(transformer)
        self._path = path
        self._permutations = permutations
        self._hooked: list[weakref.ref[torch.nn.Module]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._run = 0
        self._fits = False
        self._wanted: tuple[TokenOrder, Grid] | None = None
        self._batch = 0
        self._tables_moved = self._tokens_moved = False
        self._argument_handle = None
        if path is not None and path.argument:
            # From the start: a hook that is set in another one, as the others are, is not called in the same forward.
            hook = self._move_argument
            self._argument_handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)

    def begin(self, orders: Collection[TokenOrder], at: DenoisingStep | None) -> None:
        """Decide about the forward that begins now.

        Args:
            orders: those of the layers that will be sparse in it.
            at: where the run stands.
        """
        self._wanted = None
        self._tables_moved = self._tokens_moved = False
        if self._path is None or len(orders) != 1 or at is None or at.grid is None:
            return
        (order,) = orders
        if order.order == "raster":
            return
        if at.run != self._run:  # once a run: all modules are asked
            self._run, self._fits = at.run, self._would_go_unnoticed()
        if self._fits:
            self._attach()
            self._wanted = order, at.grid

    def holds(self) -> bool:
        """Whether the tokens that layers see are in the order of their blocks now.

        Raises:
            RuntimeError: only some of the hooks were called, and the output would be wrong.
        """
        self._check(self._tables_moved == self._tokens_moved)
        return self._tokens_moved

    def end(self) -> None:
        """Remove all hooks."""
        self._detach()
        self._wanted = None
        if self._argument_handle is not None:
            self._argument_handle.remove()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._hooked = []

    def _would_go_unnoticed(self) -> bool:
        transformer = self._transformer()
        if parallel_config(transformer) is not None or not has_own_forward(transformer):
            return False
        if any(_is_compiled(module) for module in (transformer, *self._modules())):
            return False
        self._detach()
        if any(_has_hooks(module) for module in transformer.modules() if module is not transformer):
            return False
        return not keeps_state_between_forwards(transformer)

    def _modules(self) -> list[torch.nn.Module]:
        """Where tokens and output come from; what gives the tables, if that is one, and what is told the timesteps."""
        path = self._path
        names = (path.entry, path.exit, path.tables, path.timesteps)
        return [self._transformer().get_submodule(name) for name in names if name]

    def _attach(self) -> None:
        """Set the hooks, anew if a module was replaced by another since, as LoRA does."""
        modules = self._modules()
        if [found() for found in self._hooked] == modules:
            return
        self._detach()
        entry, exit_, *others = modules
        others = iter(others)
        tables = [next(others)] if self._path.tables else []
        self._handles = [
            *(x.register_forward_hook(self._move_tables) for x in tables),
            entry.register_forward_hook(self._move_tokens),
            exit_.register_forward_hook(self._move_back),
            *(x.register_forward_pre_hook(self._move_timesteps, with_kwargs=True) for x in others),
            self._transformer().register_forward_hook(self._after_forward, prepend=True),
        ]
        self._hooked = [weakref.ref(module) for module in modules]

    def _permutation(self, x: torch.Tensor) -> torch.Tensor:
        return self._permutations(*self._wanted, x.device)

    def _tokens(self) -> int:
        return math.prod(self._wanted[1])

    # Inside a graph hooks do nothing: what they decide by would be compiled in.

    def _move_argument(self, transformer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if torch.compiler.is_compiling() or self._wanted is None:
            return None
        name = self._path.argument
        if name in list(inspect.signature(type(transformer).forward).parameters)[1 : 1 + len(args)]:
            self._wanted = None
            return None
        if kwargs.get(name) is None:
            self._tables_moved = True
            return None
        moved = self._move_tables(transformer, args, kwargs[name])
        return None if moved is None else (args, {**kwargs, name: moved})

    def _move_tables(self, _: torch.nn.Module, args: tuple, output: Any) -> Any:
        if torch.compiler.is_compiling() or self._wanted is None:
            return None
        dim = self._path.tables_dim
        if not all(table.shape[dim] == self._tokens() for table in output):
            self._wanted = None
            return None
        self._tables_moved = True
        return tuple(table.index_select(dim, self._permutation(table)) for table in output)

    def _move_tokens(self, _: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if torch.compiler.is_compiling() or not self._tables_moved:
            return None
        is_volume = output.ndim == 5
        tokens = output.flatten(2).transpose(1, 2) if is_volume else output
        text = tokens.shape[1] - self._tokens()
        self._check(text == 0 or (text > 0 and not is_volume))
        self._batch = len(tokens)
        self._tokens_moved = True
        moved = tokens[:, text:].index_select(1, self._permutation(tokens))
        if text:
            return torch.cat([tokens[:, :text], moved], dim=1)
        return moved.transpose(1, 2).unflatten(2, output.shape[2:]) if is_volume else moved

    def _move_timesteps(self, _: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if torch.compiler.is_compiling() or not self._tokens_moved:
            return None
        timesteps, *rest = args
        if timesteps.numel() != self._batch * self._tokens():
            return None
        of_tokens = timesteps.view(self._batch, -1).index_select(1, self._permutation(timesteps))
        return (of_tokens.view_as(timesteps), *rest), kwargs

    def _move_back(self, _: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if torch.compiler.is_compiling() or not self._tokens_moved:
            return None
        self._tokens_moved = False
        # Should the finite guard compute the forward again, tables that were given come as they are now.
        self._tables_moved = bool(self._path.argument)
        return torch.empty_like(output).index_copy_(1, self._permutation(output), output)

    def _after_forward(self, _: torch.nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._check(not self._tokens_moved)

    def _check(self, holds: bool) -> None:
        if not holds:
            raise RuntimeError(
                f"the tokens of {type(self._transformer()).__name__} were put into the order of the blocks only in "
                "part, as something calls its modules in another way than diffusers does; use a preset with "
                "`order: raster`"
            )


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody sees, or changes, what goes through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
