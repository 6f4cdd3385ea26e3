"""What a user tells a patch of a run that no pipeline makes: its timesteps, and the step of forwards to be captured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.runs import Runs
from psa_diffusers.patch.stated_step import stated_step


class Told:
    """The part of PSAProcessor that is told of loops by hand."""

    _runs: Runs
    _attention: TokenAttention

    def run(self, timesteps: torch.Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """Tell which timesteps the denoising loop inside a `with` block goes through, for loops by hand.

        A pipeline's own run needs no telling, nor does a loop over the timesteps of the pipeline's scheduler.

        Example:
            >>> with processor.run(timesteps):
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
        """Inside `run`, state that forwards are of one step, whatever timestep they are given, to capture them.

        A replay attends as the step that was captured: dense or sparse, with lists made anew or with those that the
        graph of an earlier step writes. So capture one graph for each kind of step, in the order of the steps.

        Example:
            >>> with processor.run(timesteps), processor.step(30), torch.no_grad():
            ...     transformer(**inputs)  # compiles kernels, which cannot be done in a capture
            ...     with torch.cuda.graph(graph):
            ...         noise = transformer(**inputs, return_dict=False)[0]

        Args:
            index: of the step among the timesteps of `run`, counted from 0.
            branch: which forward of the step, of those of different guidance, counted from 0.
            text_tokens: how many text tokens of each sample are no padding, where the model is given a mask that tells.
                It is checked at each forward that is not captured.

        Raises:
            ValueError: a number is out of range.
            RuntimeError: it is not inside `run`.
        """
        if (steps := self._runs.told_steps()) is None:
            raise RuntimeError(f"step({index!r}): expected inside `with psa.run(timesteps):`, which tells the run")
        stated = stated_step(index, steps, branch, text_tokens)
        before = self._runs.stated, self._attention.text_tokens
        self._runs.stated, self._attention.text_tokens = stated, stated.text_tokens
        try:
            yield
        finally:
            self._runs.stated, self._attention.text_tokens = before
