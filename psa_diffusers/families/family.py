"""What a model family says about its transformers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from psa_diffusers.diffusers_internals import own_plan

if TYPE_CHECKING:
    import torch

    Ready = Callable[[str, torch.Tensor], None]


class DenseOnlyError(Exception):
    """This call of a layer cannot be sparse; the message says why. The processor catches it and runs it dense."""


def unheard(part: str, x: torch.Tensor) -> None:
    """Where nobody waits for a part of a projection."""


@dataclass(frozen=True)
class AttentionCall:
    """What diffusers called an attention module with.

    Attributes:
        hidden_states: `[B, N, C]`: the video tokens, perhaps after others (`history`) or before others (`appended`).
        encoder_hidden_states: `[B, T, C]`: text tokens of joint attention, None where text has cross-attention.
        attention_mask: as the model made it, or None.
        rotary_emb: positions as the model made them, or None; families differ in what it is.
        more: whatever else a family reads.
        ready: called with "queries", "keys" and "values", in this order, and with each as soon as `project` has it:
            ranks exchange it while the next is projected. Only families with a plan for context parallelism call it.
    """

    hidden_states: torch.Tensor
    encoder_hidden_states: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    rotary_emb: Any = None
    more: Any = None
    ready: Ready = unheard

    @property
    def text_tokens(self) -> int:
        """Number of text tokens, padding included."""
        return 0 if self.encoder_hidden_states is None else self.encoder_hidden_states.shape[1]

    def heard_by(self, ready: Ready) -> AttentionCall:
        """The same with another `ready`.

        Written out, because a graph that holds `dataclasses.replace` checks every field of the class at each call.
        """
        text, mask = self.encoder_hidden_states, self.attention_mask
        return AttentionCall(self.hidden_states, text, mask, self.rotary_emb, self.more, ready)


def is_of_diffusers(kind: type) -> bool:
    """Whether a class is one of diffusers itself."""
    return kind.__module__.partition(".")[0] == "diffusers"


class ModelFamily(ABC):
    """One architecture; nothing is instantiated.

    Transformers and attention modules are those of diffusers, whose attributes no base class names.

    Attributes:
        name: as users know it.
        order: its place among the families wherever they are listed: small ones first, then by name.
        transformers: names of the diffusers classes that the family covers.
        processors: names of the diffusers classes whose attention `project` and `output` compute: all stock processors
            that a video self-attention of the family may have.
        arguments: names of all that the stock processors of its transformers take, those of cross-attention included.
        text: where text tokens stand in the self-attention: before the video tokens, after them, or not in it.
        history: whether tokens that are not in the grid (earlier frames, conditions) may precede the video tokens; they
            are attended exactly, as text is.
        appended: whether such tokens may follow the video tokens, in a family whose self-attention has no text.
        several_videos: whether a layer may attend several videos of one grid, one after another in hidden_states: to it
            they are one video with the frames of all.
        replicates_text: whether in context parallel all text is on every rank, although the family's own processor
            would share the heads of attention to it as it does those of self-attention.
        stock_traceable: whether `torch.compile` can take the family's own processors into a graph.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 100
    transformers: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[str, ...]]
    arguments: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "temb",
        "rotary_emb",
        "image_rotary_emb",
    )
    text: ClassVar[Literal["none", "before", "after"]] = "none"
    history: ClassVar[bool] = False
    appended: ClassVar[bool] = False
    several_videos: ClassVar[bool] = False
    replicates_text: ClassVar[bool] = False
    stock_traceable: ClassVar[bool] = True

    @staticmethod
    @abstractmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        """The video self-attention modules by name, first layer first."""

    @staticmethod
    @abstractmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Video tokens along frames, height and width, from the arguments of the transformer's forward by name.

        None where these do not tell: such a forward is dense.

        Raises:
            DenseOnlyError: no layer can be sparse in this forward.
        """

    @staticmethod
    def always_dense(transformer: Any) -> str | None:
        """Why `token_grid` will refuse every forward, as far as the configuration tells; None if it does not."""
        return None

    @staticmethod
    def tokens(inputs: Mapping[str, Any], grid: tuple[int, int, int]) -> int:
        """How many tokens a block's self-attention is given in a forward, text apart that it is given on its own.

        Ranks of context parallelism share as many; by default those of the grid.

        Args:
            inputs: the arguments of the transformer's forward by name.
            grid: what `token_grid` made of them.
        """
        return math.prod(grid)

    @staticmethod
    def noisy_part(inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """The latents by which windows of a long video are told from guidance branches, which have these in common.

        By default all that the transformer is given; None if it is given none.

        Args:
            inputs: the arguments of the transformer's forward by name.
        """
        return inputs.get("hidden_states")

    @staticmethod
    def timestep(inputs: Mapping[str, Any]) -> Any:
        """The timestep of a forward as `timesteps` have it: a number, a tensor, or None if not given.

        The largest value of a tensor counts, as conditions have timestep 0.

        Args:
            inputs: the arguments of the transformer's forward by name.
        """
        return inputs.get("timestep")

    @staticmethod
    def timesteps(scheduler: Any) -> torch.Tensor:
        """What `timestep` gives at each step of a scheduler, `[steps]`: by default its `timesteps`.

        For models that are given something else, which cannot be turned back into a timestep once it is rounded.
        """
        return scheduler.timesteps

    @classmethod
    def call(cls, arguments: Mapping[str, Any]) -> AttentionCall | None:
        """What `project` and `output` need of a call of one of `processors`; None where it computes no attention.

        Such a call, and one of a layer that is dense, goes to the module's own processor with all its arguments.

        Args:
            arguments: of the call by the processor's names for them, without the attention module.
        """
        positions = arguments.get("rotary_emb")
        return AttentionCall(
            arguments["hidden_states"],
            arguments.get("encoder_hidden_states"),
            arguments.get("attention_mask"),
            arguments.get("image_rotary_emb") if positions is None else positions,
        )

    @staticmethod
    @abstractmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[B, tokens, H, D]` of video and text, normalised and rotated.

        Text stands where `text` says, padding included. Modules are called, never their weights read: LoRA, casting,
        offload and quantisation live in the calls.
        """

    @staticmethod
    @abstractmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> Any:
        """What the family's own processor returns, from the attention output.

        Args:
            call: what `project` was given.
            video: `[B, N, H, D]` for the tokens of `hidden_states`.
            text: `[B, T, H, D]` for those of `encoder_hidden_states`, zero at padding; None where there are none.
        """

    @staticmethod
    def text_mask(call: AttentionCall) -> torch.Tensor | None:
        """Bool `[B, T]`, False at padding, which no token may attend; None if all text is real.

        Raises:
            DenseOnlyError: the call's mask says something that cannot be said so.
        """
        if call.attention_mask is not None:
            raise DenseOnlyError("the layer was given an attention mask")
        return None

    @classmethod
    def why_not_imitated(cls, processor: Any) -> str | None:
        """Why a processor cannot be replaced by `project`, attention and `output`; None if they compute the same.

        Only the stock classes themselves are known: a subclass may do anything.
        """
        kind = type(processor)
        if kind.__name__ not in cls.processors:
            name = kind.__name__
        elif not is_of_diffusers(kind):
            name = f"{kind.__name__} of {kind.__module__}"
        else:
            return None
        return f"its processor {name} is not one that {cls.name} is known to compute ({', '.join(cls.processors)})"

    @staticmethod
    def video_readers(transformer: Any) -> Collection[torch.nn.Module]:
        """Attentions of other tokens whose keys are the video's, of which in context parallel each rank has a part.

        Where `replicates_text`, these alone share their heads as the family's own processor does it.
        """
        return ()

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any] | None:
        """Where context parallelism splits and joins the video tokens; text of joint attention stays on every rank.

        None if it cannot be; by default diffusers' own plan for the model, if it has one.
        """
        return own_plan(transformer)
