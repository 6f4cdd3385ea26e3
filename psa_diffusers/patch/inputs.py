"""What the forward of a transformer was given."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch

from psa_diffusers.patch.frames import local_variables


def going_on(transformer: torch.nn.Module) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of a module's current call, from the frame of torch's `__call__`; None if there is no such call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_wrapped_call_impl":
            call = local_variables(frame, ("self", "args", "kwargs"))
            if call.get("self") is transformer:
                return call["args"], call["kwargs"]
        frame = frame.f_back
    return None


def device_of(transformer: Any, inputs: Mapping[str, Any]) -> torch.device:
    """The device of a forward: that of its inputs, because weights may be offloaded."""
    video = inputs.get("hidden_states")
    return video.device if torch.is_tensor(video) else transformer.device


@functools.cache
def argument_names(transformer: Any) -> tuple[str, ...]:
    """The argument names of the forward of a class of transformers, in order."""
    return tuple(inspect.signature(transformer.forward).parameters)[1:]
