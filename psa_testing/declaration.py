"""What the tests know of a model family: all that its file in `psa_testing/families/` declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from psa_diffusers.families import ModelFamily
from psa_testing.cases import Case, ParallelCase, SavedCase
from psa_testing.full_size import Network, Published


@dataclass(frozen=True)
class FamilyTests:
    """A family's tiny pipelines, published checkpoints, and what holds of all of them.

    Attributes:
        family: the class that is tested.
        cases: tiny random pipelines by name.
        networks: its transformers by class, at full size.
        published: its checkpoints.
        parallel: cases of context parallelism by name; empty where the family has no plan for it.
        saved: pipelines for psa-generate by name.
        masks_padding: whether the model masks the padding of its text, so that it counts for nothing.
        takes_lora: whether diffusers loads LoRA into it.
        has_set_attn_processor: whether its transformers have `set_attn_processor`.
        mask: what its attention modules call an attention mask; None where they take none.
    """

    family: type[ModelFamily]
    cases: Mapping[str, Case]
    networks: Mapping[str, Network]
    published: tuple[Published, ...]
    parallel: Mapping[str, ParallelCase] = field(default_factory=dict)
    saved: Mapping[str, SavedCase] = field(default_factory=dict)
    masks_padding: bool = False
    takes_lora: bool = True
    has_set_attn_processor: bool = True
    mask: str | None = "attention_mask"
