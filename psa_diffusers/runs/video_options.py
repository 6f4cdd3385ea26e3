"""Checks the size, frames, rate, steps and image of a request against what the model can make."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.checkpoints.resolve import Model
from psa_diffusers.environment import memory_gib
from psa_diffusers.errors import InputError
from psa_diffusers.runs.request import Request, given, in_range

if TYPE_CHECKING:
    from PIL import Image


def load_image(path: str | None, model: Model, required: bool = True) -> "tuple[Image.Image | None, str | None]":
    """The image file as RGB, upright, and its digest; None for both if no image is given.

    Args:
        required: whether to refuse a request without an image for a model that needs one.

    Raises:
        InputError: the model takes none or needs one, or the file cannot be read.
    """
    if path is None:
        if model.kind.image == "first" and required:
            raise InputError(f"--image: {model.name} makes a video from an image; give --image FILE")
        return None, None
    if not model.takes_image:
        able = ", ".join(card.name for card in MODELS.values() if PIPELINE_KINDS[card.pipeline].takes_image)
        raise InputError(f"--image: {model.name} makes a video from words alone; models that take an image: {able}")
    from PIL import Image, ImageOps

    try:
        content = Path(path).read_bytes()
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB"), hashlib.sha256(content).hexdigest()[:32]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {path}: cannot be read as an image ({type(error).__name__})") from error


def video_size(request: Request, model: Model, image: "Image.Image | None") -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        InputError: the model cannot make it.
    """
    step, card = model.size_step, model.card
    if model.fixed_size is not None:
        asked = (given(request.height, card.height), given(request.width, card.width))
        if asked != model.fixed_size:
            fixed = " x ".join(map(str, model.fixed_size))
            raise InputError(f"--height {asked[0]} --width {asked[1]}: {model.name} makes videos of {fixed} only")
        return asked
    if model.image_size is not None and image is not None:
        made = model.image_size(image.height, image.width)
        asked = (given(request.height, made[0]), given(request.width, made[1]))
        if asked != made:
            raise InputError(
                f"--height {asked[0]} --width {asked[1]}: {model.name} makes {made[0]} x {made[1]} of this image, "
                "and no other size"
            )
        return made
    if image is not None and model.kind.begins_with_image and request.height is None and request.width is None:
        area, ratio = card.height * card.width, image.height / image.width
        height = max(step, round((area * ratio) ** 0.5) // step * step)
        width = max(step, round((area / ratio) ** 0.5) // step * step)
        return height, width
    height, width = given(request.height, card.height), given(request.width, card.width)
    for option, value in (("--height", height), ("--width", width)):
        if value < step or value % step:
            below = max(step, value // step * step)
            near = f"{below} or {below + step}" if value > step else f"{step}"
            raise InputError(f"{option} {value}: {model.name} needs a multiple of {step}, such as {near}")
    return height, width


def fit_image(image: "Image.Image", height: int, width: int) -> "Image.Image":
    """Scale an image to cover the video's size, and crop the rest, so that nothing is squeezed."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def frame_count(frames: int, model: Model) -> int:
    """Frames of the video.

    Raises:
        InputError: the model cannot make it.
    """
    step, rest, only = model.frame_step, model.kind.frame_rest, model.kind.only_frames
    if only is not None and frames != only:
        raise InputError(f"--frames {frames}: {model.name} makes {only} frames, and no other number")
    fewest, most = model.kind.frame_range or (frames, frames)
    if not fewest <= frames <= most:
        raise InputError(f"--frames {frames}: {model.name} makes videos of {fewest} to {most} frames")
    if frames < 1 or (frames - rest) % step:
        below = max(rest or step, (frames - rest) // step * step + rest)
        form = f"{step}k+{rest}" if rest else f"a multiple of {step}"
        raise InputError(f"--frames {frames}: must be {form}, such as {below} or {below + step}")
    return frames


def fits_in_memory(height: int, width: int, frames: int) -> None:
    """Refuse a video whose frames, in 8 bits, are more than this machine's memory.

    Raises:
        InputError: names the options.
    """
    memory, needed = memory_gib(), 3 * height * width * frames / 2**30
    if memory is not None and needed > memory:
        raise InputError(
            f"--height {height} --width {width} --frames {frames}: the frames alone are {needed:,.0f} GiB, "
            f"and this machine has {memory:g} GiB of memory"
        )


def frame_rate(asked: int | None, model: Model) -> int:
    """Frames a second.

    Raises:
        InputError: the model cannot make it.
    """
    only = model.kind.fps
    if only is not None and asked not in (None, only):
        raise InputError(f"--fps {asked}: {model.name} makes videos of {only} frames a second only")
    return in_range("--fps", given(asked, only or model.card.fps), 1, 240)


def step_count(steps: int | None, model: Model) -> int:
    """Denoising steps that the pipeline is asked for.

    Raises:
        InputError: the model cannot make it.
    """
    card = model.card
    if card.fixed_steps and steps not in (None, card.steps):
        raise InputError(f"--steps {steps}: {model.name} is distilled for {card.steps} steps of given noise levels")
    return in_range("--steps", given(steps, card.steps), 1 + model.kind.idle_steps, 1000)
