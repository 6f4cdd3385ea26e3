"""A tiny pipeline and what it is called with, and what the families' pipelines are called with alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from psa_diffusers.patch.modules import TRANSFORMERS
from psa_testing.random_norms import draw_norms
from psa_testing.tiny_pipelines import tiny_image

Inputs = dict[str, Any]

COMMON: Inputs = {
    "prompt": "dance monkey",
    "num_inference_steps": 4,
    "height": 128,
    "width": 128,
    "num_frames": 9,
    "output_type": "latent",
}
# A prompt of other length in the other branch: its padding is another.
GUIDED: Inputs = {"negative_prompt": "bad", "guidance_scale": 5.0}
TWO_PROMPTS: Inputs = {"prompt": ["a cat", "a longer prompt, about a dog"], "negative_prompt": ["", "bad"]}
SMALL_TEXT: Inputs = {"max_sequence_length": 16}
SIZES: tuple[Inputs, ...] = ({"height": 96, "width": 160}, {"num_frames": 5, "height": 112, "width": 80})
UNEVEN: Inputs = {"height": 80, "width": 112}  # 3 x 5 x 7 tokens, where one is 16 x 16 pixels
IMAGE = tiny_image(128, 128)


@dataclass(frozen=True)
class JointText:
    """What is known of the text of a case that is called with the prompts "a cat" and "a dog, running".

    Attributes:
        tokens: text tokens of a sample, padding included.
        attended: of each sample, how many are attended: one for each character of the prompt and one for its end, or
            all where the model masks no padding.
        inputs: other arguments of that call.
    """

    tokens: int
    attended: tuple[int, ...]
    inputs: Inputs = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A pipeline and its run: by default 3 x 8 x 8 video tokens, 4 steps.

    Attributes:
        build: makes the pipeline as its classes make it.
        inputs: arguments of its call.
        others: what to call it with besides: other sizes, frame counts and batches.
        one_each: whether it stands for its transformer's class in what does not depend on the pipeline: one of each.
        text: what is known of its text; None where the text has cross-attention of its own, or is not looked at.
        fuses: whether diffusers fuses its projections while the patch is on.
        call: calls the pipeline and returns the video's latents, where that is another thing than `pipe(...).frames`.
    """

    build: Callable[[], Any]
    inputs: Inputs
    others: tuple[Inputs, ...] = ()
    one_each: bool = False
    text: JointText | None = None
    fuses: bool = False
    call: Callable[[Any, Inputs], torch.Tensor] | None = None

    def make(self) -> Any:
        """The pipeline, always the same, with weights in the norms of its attention that tell one norm from another."""
        torch.manual_seed(0)
        pipe = self.build()
        for name in TRANSFORMERS:
            if getattr(pipe, name, None) is not None:
                draw_norms(getattr(pipe, name))
        return pipe

    @cached_property
    def stock(self) -> torch.Tensor:
        """What the pipeline gives as it is made: the same every time, so that a process computes it once."""
        return self.run(self.make())

    def run(self, pipe: Any, seed: int = 0, **overrides: Any) -> torch.Tensor:
        """Latents rather than frames: the VAE has no part in what is tested."""
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed)
        arguments = {**COMMON, **self.inputs, "generator": generator, **overrides}
        # None stands for an argument that the pipeline does not have, or that another replaces.
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if self.call is not None:
            return self.call(pipe, arguments)
        frames = pipe(**arguments).frames
        return torch.cat(frames, dim=2) if isinstance(frames, list) else frames  # Framepack: latents of each section


@dataclass(frozen=True)
class Ranks:
    """One run that several processes share.

    Attributes:
        count: of processes.
        first: what is done to the pipeline first.
        inputs: arguments of the call, beside the case's.
        any_length: whether the tokens need not be shared evenly.
    """

    count: int
    first: Literal["parallelism", "patch"] = "parallelism"
    inputs: Inputs = field(default_factory=dict)
    any_length: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of diffusers' `ContextParallelConfig`."""
        return {"ulysses_degree": self.count, **({"ulysses_anything": True} if self.any_length else {})}


@dataclass(frozen=True)
class ParallelCase:
    """A case with as many heads as there may be ranks, and the runs of it that must equal one process."""

    case: Case
    runs: tuple[Ranks, ...]


@dataclass(frozen=True)
class SavedCase:
    """A pipeline that psa-generate loads from a folder and runs.

    Attributes:
        build: makes it, with all components that a saved pipeline has.
        size: height and width in pixels.
        frames: frames of its video.
        stand_ins: methods of its class that do not work in a tiny pipeline, by name, and what is called instead.
    """

    build: Callable[[], Any]
    size: int
    frames: int
    stand_ins: dict[str, Callable[..., Any]] = field(default_factory=dict)
