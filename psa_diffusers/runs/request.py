"""The options of a run as they were given, and what all checks of them share."""

from dataclasses import dataclass
from typing import Any

from psa_diffusers.errors import InputError


@dataclass(frozen=True)
class Request:
    """The command's options as given; None means the model's own default, and for `preset` that of `choose_preset`.

    `prompts` are words, files or `-`, as `read_prompts` takes them; with `literal` they are only words. With `check`
    nothing is generated: prompts and a first frame may be missing, and LoRAs are left out, because their files are
    weights.
    """

    prompts: tuple[str, ...]
    model: str = "demo"
    preset: str | None = None
    preset_2: str | None = None
    density: float | None = None
    compare: bool = False
    output: str | None = None
    seed: int = 0
    samples: int = 1
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int | None = None
    negative_prompt: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    offload: str = "none"
    compile: bool = False
    cuda_graphs: bool | None = None
    image: str | None = None
    overwrite: bool = False
    strict: bool = False
    vbench: bool = False
    literal: bool = False
    check: bool = False
    lora: tuple[str, ...] = ()
    lora_2: tuple[str, ...] = ()


def given(value: Any, default: Any) -> Any:
    """An option, or its default where it is not given."""
    return default if value is None else value


def in_range(option: str, value: Any, low: Any, high: Any) -> Any:
    """A number, which must be between two others.

    Raises:
        InputError: it is not.
    """
    if not low <= value <= high:  # also false for NaN
        raise InputError(f"{option} {value}: must be from {low} to {high}")
    return value


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Check one of a few words.

    Raises:
        InputError: it is none of them.
    """
    if value not in allowed:
        raise InputError(f"{option} {value}: must be one of {', '.join(allowed)}")
