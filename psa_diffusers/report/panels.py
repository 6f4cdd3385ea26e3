"""Labelled pictures of two videos: played side by side, and as a strip of frames one above the other."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from psa_diffusers.files import whole_file
from psa_diffusers.report.video import evenly, to_uint8

if TYPE_CHECKING:
    from PIL import Image, ImageFont

BACKGROUND = (20, 22, 26)
NAME_COLOUR = (245, 246, 248)
FACT_COLOUR = (168, 175, 186)
MIN_PANEL_WIDTH = 384
GAP = 4
STRIP_FRAMES = 6
STRIP_FRAME_WIDTH = 256


@dataclass(frozen=True)
class Label:
    """The text above a panel: a name on the left, facts such as "48.3 s" and "density 0.44" on the right."""

    name: str
    facts: tuple[str, ...] = ()


def side_by_side(left: np.ndarray, right: np.ndarray, labels: tuple[Label, Label]) -> np.ndarray:
    """Join two videos of one size and length, frame by frame, under a line of labels.

    Args:
        left, right: [frames, height, width, 3].

    Returns:
        uint8 [frames, height * scale + bar, 2 * width * scale + GAP, 3], both sides even. Panels narrower than
        `MIN_PANEL_WIDTH` are enlarged by a whole number (`scale`), so that the labels can be read.
    """
    _same_shape(left, right)
    count, height, width, _ = left.shape
    scale = max(1, -(-MIN_PANEL_WIDTH // width))
    panel_height, panel_width = height * scale, width * scale
    bar = bar_height(panel_width)
    total_width = 2 * panel_width + GAP
    canvas = np.empty((count, panel_height + bar, total_width + total_width % 2, 3), np.uint8)
    canvas[:] = BACKGROUND
    for index, video in enumerate((left, right)):
        at = index * (panel_width + GAP)
        canvas[:, :bar, at : at + panel_width] = label_bar(labels[index], panel_width, bar)
        pixels = to_uint8(video)
        for number in range(count):
            canvas[number, bar : bar + panel_height, at : at + panel_width] = _enlarge(pixels[number], scale)
    if canvas.shape[1] % 2:
        canvas = np.pad(canvas, ((0, 0), (0, 1), (0, 0), (0, 0)), mode="edge")
    return canvas


def filmstrip(top: np.ndarray, bottom: np.ndarray, labels: tuple[Label, Label]) -> "Image.Image":
    """A few frames of each video, evenly spread over time: the first video's row above the second's."""
    from PIL import Image

    _same_shape(top, bottom)
    count, height, width, _ = top.shape
    numbers = evenly(count, STRIP_FRAMES)
    cell_width = min(STRIP_FRAME_WIDTH, max(width, STRIP_FRAME_WIDTH // 2))
    cell_height = max(1, round(height * cell_width / width))
    strip_width = len(numbers) * (cell_width + GAP) - GAP
    bar = bar_height(MIN_PANEL_WIDTH)
    strip = Image.new("RGB", (strip_width, 2 * (bar + cell_height) + GAP), BACKGROUND)
    for row, (video, label) in enumerate(((top, labels[0]), (bottom, labels[1]))):
        y = row * (bar + cell_height + GAP)
        strip.paste(Image.fromarray(label_bar(label, strip_width, bar)), (0, y))
        for column, number in enumerate(numbers):
            cell = Image.fromarray(to_uint8(video[number])).resize((cell_width, cell_height), Image.Resampling.LANCZOS)
            strip.paste(cell, (column * (cell_width + GAP), y + bar))
    return strip


def write_image(path: Path, image: "Image.Image") -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as partial:
        image.save(partial)  # optimizing takes ten times as long and saves only a twentieth of the size


def bar_height(panel_width: int) -> int:
    """Height in pixels of the labels above a panel; even."""
    return 2 * round(max(28, min(64, panel_width * 0.08)) / 2)


def label_bar(label: Label, width: int, height: int) -> np.ndarray:
    """A line with the label's name on the left and its facts on the right: uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw

    bar = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(bar)
    margin = height // 3
    facts = "   ".join(label.facts)
    size = round(height * 0.5)
    while size > 8 and _length(label.name, size) + _length(facts, size) + 3 * margin > width:
        size -= 1
    name = label.name
    while len(name) > 1 and _length(name, size) + _length(facts, size) + 3 * margin > width:
        name = name[:-1]
    draw.text((margin, height / 2), name, font=font(size), fill=NAME_COLOUR, anchor="lm")
    draw.text((width - margin, height / 2), facts, font=font(size), fill=FACT_COLOUR, anchor="rm")
    return np.asarray(bar)


@lru_cache
def font(size: int) -> "ImageFont.FreeTypeFont | ImageFont.ImageFont":
    """Pillow's own font at a size in pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _length(text: str, size: int) -> float:
    return font(size).getlength(text)


def _enlarge(frame: np.ndarray, scale: int) -> np.ndarray:
    if scale == 1:
        return frame
    from PIL import Image

    height, width, _ = frame.shape
    return np.asarray(Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC))


def _same_shape(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"the two videos differ in shape: {first.shape} and {second.shape}")
