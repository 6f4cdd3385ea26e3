"""What a user tells a patch about a loop of their own: its timesteps, and the step of forwards to be captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.runs import Runs
from psa_diffusers.patch.stated_step import stated_step


class Told:
    """The part of PSAProcessor for denoising loops written by hand."""

    _runs: Runs
    _attention: TokenAttention

    def run(self, timesteps: torch.Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """Tell which timesteps the denoising loop inside a `with` block goes through, for loops written by hand.

        A pipeline's own run needs no telling, nor does a loop over the timesteps of the pipeline's scheduler.

        Example:
            >>> with torch.no_grad(), processor.run(timesteps):
            ...     for t in timesteps:
            ...         noise = transformer(latents, t.expand(1), text, return_dict=False)[0]

        Args:
            timesteps: those of all denoising steps, `[steps]`, as the transformer is given them.

        Raises:
            ValueError: they are not a sequence of finite numbers.
        """
        return self._runs.told(timesteps)

    @contextmanager
    def step(self, index: int, *, branch: int = 0, text_tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Inside `run`, state which step forwards belong to, whatever timestep they are given, so as to capture them.

        A replay attends as the captured step did: dense or sparse, with new lists or with those that the graph of an
        earlier step writes. So capture one graph for each kind of step, in the order of the steps.

        Example:
            >>> with processor.run(timesteps), processor.step(30), torch.no_grad():
            ...     transformer(**inputs)  # compiles kernels, which is impossible during a capture
            ...     with torch.cuda.graph(graph):
            ...         noise = transformer(**inputs, return_dict=False)[0]

        Args:
            index: of the step among the timesteps of `run`, counted from 0.
            branch: the guidance branch: which forward of the step it is, counted from 0.
            text_tokens: how many text tokens of each sample are no padding, for models that are given a text mask. It
                is checked against the mask at each forward that is not captured.

        Raises:
            ValueError: a number is out of range.
            RuntimeError: it is not inside `run`.
        """
        if (steps := self._runs.told_steps()) is None:
            raise RuntimeError(f"step({index!r}): expected inside `with psa.run(timesteps):`, which tells the run")
        stated = stated_step(index, steps, branch, text_tokens)
        dense = self._attention.dense
        before = self._runs.stated, dense.text_tokens
        self._runs.stated, dense.text_tokens = stated, stated.text_tokens
        try:
            yield
        finally:
            self._runs.stated, dense.text_tokens = before
