"""One question about one video: frames, an answer, and how long the prompt took to read."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from psa_presets import Preset
from psa_transformers.apply import apply_psa
from psa_transformers.spans import vision_ids

MAX_FRAMES = 100_000  # of a file; more are not looked at


class QuestionError(ValueError):
    """A question cannot be asked; the message is one line that names the thing and why."""


@dataclass(frozen=True)
class Frames:
    """Frames of a video, evenly spaced.

    Attributes:
        pixels: uint8 `[frames, height, width, 3]`, RGB.
        indices: which of the file's frames they are.
        fps: frames a second of the file.
        total: how many frames the file has.
    """

    pixels: np.ndarray
    indices: list[int]
    fps: float
    total: int

    def metadata(self) -> dict[str, Any]:
        """As the processors of transformers take it."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps,
            "frames_indices": self.indices,
            "height": self.pixels.shape[1],
            "width": self.pixels.shape[2],
        }


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        prompt_tokens: of text and video.
        prefill_seconds: from the first token read to the first written, on the model's device.
    """

    text: str
    prompt_tokens: int
    prefill_seconds: float


def read_frames(path: Path, count: int) -> Frames:
    """Read evenly spaced frames of a video, in two passes, of which the first only counts.

    Raises:
        QuestionError: there is no such file, or it holds no video.
    """
    if not os.path.isfile(path):  # also for a name that is too long, where Path.is_file raises
        raise QuestionError(f"{path}: no such file")
    name = str(path.absolute())  # PyAV takes a relative "a:b" for an address
    try:
        with av.open(name) as opened:
            fps = float(opened.streams.video[0].average_rate or 24)
            total = sum(1 for _, _ in zip(opened.decode(video=0), range(MAX_FRAMES), strict=False))
        indices = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
        wanted, found = set(indices), []
        with av.open(name) as opened:
            for number, frame in enumerate(opened.decode(video=0)):
                if number in wanted:
                    found.append(frame.to_ndarray(format="rgb24"))
                if number >= total - 1:
                    break
        return Frames(np.stack(found), indices, fps, total)
    except (av.FFmpegError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuestionError(f"{path}: no video that can be read ({reason})") from None


def configuration(name: str) -> Any:
    """The configuration of a vision-language model, of a folder or of the hub.

    Raises:
        QuestionError: it cannot be had, or the model sees nothing.
    """
    if os.path.isfile(name):  # transformers would take any file for weights
        raise QuestionError(f"model {name}: a file; allowed: a folder or a hub id")
    with _told(name):
        config = AutoConfig.from_pretrained(name)
    if not vision_ids([config, getattr(config, "thinker_config", None)]):
        raise QuestionError(f"model {name}: a {config.model_type} sees no images or videos")
    return config


def check_served(name: str, config: Any, preset: Preset) -> None:
    """Check that PSA takes a model, on one without weights.

    Raises:
        QuestionError: it does not, or no model can be made of the configuration.
    """
    with _told(name), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    try:
        apply_psa(model, preset).restore()
    except (TypeError, ValueError) as error:
        raise QuestionError(f"model {name}: {error}") from None


def load(name: str, device: str) -> tuple[Any, Any]:
    """A vision-language model and its processor, of a folder or of the hub; half precision on a GPU.

    Args:
        device: as torch names it, or "auto": a GPU if there is one.

    Raises:
        QuestionError: it cannot be had, it sees nothing, its weights are not complete, or there is no such device.
    """
    device = _checked(device)
    configuration(name)
    with _told(name):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model, told = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        processor = AutoProcessor.from_pretrained(name)
    _check_weights(name, told)
    return model.to(device).eval(), processor


def _check_weights(name: str, told: Mapping[str, Any]) -> None:
    """Refuse weights that are not all in the files: transformers fills these with random numbers.

    Raises:
        QuestionError: names one of them.
    """
    missing, resized = sorted(told["missing_keys"]), sorted(key for key, *_ in told["mismatched_keys"])
    if missing:
        problem = f"its weights lack {_some(missing)}; the files are not complete, or config.json is another model's"
    elif resized:
        problem = f"{_some(resized)} in its weights and in config.json differ in size"
    else:
        return
    raise QuestionError(f"model {name}: {problem}")


def _some(keys: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Let a QuestionError name the model that cannot be loaded."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files end in many kinds
        reason = " ".join(str(error).split())
        reason = (
            reason if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {reason}"
        )
        raise QuestionError(f"model {name}: cannot be loaded: {reason[:300]}") from error


def _checked(device: str) -> str:
    """The device that is meant; asked before weights are read, which takes long.

    Raises:
        QuestionError: this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = None
    if kind is None or kind.type not in ("cpu", "cuda"):
        raise QuestionError(f"device {device}: not a device for this; allowed: auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind.type == "cuda" and (kind.index or 0) >= count:
        raise QuestionError(f"device {device}: this machine has {count} CUDA devices")
    return device


def prompt(processor: Any, frames: Frames, question: str) -> Any:
    """What a processor makes of a video and a question about it, as the model takes it, on the CPU.

    Raises:
        QuestionError: it takes no videos, or has no chat template.
    """
    content = [{"type": "video"}, {"type": "text", "text": question}]
    conversation = [{"role": "user", "content": content}]
    try:
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return processor(
            text=[text],
            videos=[frames.pixels],
            video_metadata=[frames.metadata()],
            do_sample_frames=False,
            return_tensors="pt",
        )
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise QuestionError(f"{type(processor).__name__}: makes no prompt of a video: {reason[:300]}") from error


def ask(model: Any, processor: Any, frames: Frames, question: str, max_new_tokens: int) -> Answer:
    """Let a model answer, always with its most likely tokens."""
    given = prompt(processor, frames, question).to(model.device)
    read = given["input_ids"].shape[1]
    with first_forward(model) as seconds:
        out = model.generate(**given, max_new_tokens=max_new_tokens, do_sample=False)
    (said,) = processor.batch_decode(out[:, read:], skip_special_tokens=True)
    return Answer(said.strip(), read, seconds[0])


@contextmanager
def first_forward(model: torch.nn.Module) -> Iterator[list[float]]:
    """The seconds that the first forward of a model takes, its vision tower included."""
    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        if not seconds:
            seconds.append(-now())

    def end(*_: Any) -> None:
        if seconds[0] < 0:
            seconds[0] += now()

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()
