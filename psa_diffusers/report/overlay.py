"""Shows where in the video one block of queries looks closely: the levels of its key blocks, drawn over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from psa_diffusers.report.panels import (
    BACKGROUND,
    FACT_COLOUR,
    GAP,
    MIN_PANEL_WIDTH,
    Label,
    bar_height,
    font,
    label_bar,
)
from psa_diffusers.report.video import evenly, to_uint8

if TYPE_CHECKING:
    from PIL import Image

    from psa_diffusers.patch.masks import BlockMask

COLUMNS = 6
CELL_WIDTH = 256
# From hardly read (violet) to exact (yellow), brighter with every step; what is skipped shows the dark frame alone.
RAMP = ((84, 40, 143), (178, 50, 122), (238, 104, 74), (252, 228, 100))
QUERY_COLOUR = (90, 230, 255)


def attention_overlay(frames: np.ndarray, masks: Sequence[BlockMask]) -> Image.Image:
    """A row of frames for each mask: bright where its first query block reads the video exactly, dark where not at all.

    The queries' own tokens are outlined. With several heads a colour is the mean of 1 / pooling factor over them. Each
    frame is the one that the latent frame ends with.

    Args:
        frames: [frames, height, width, 3], uint8 or float in [0, 1]: the decoded video.
        masks: at least one, all of one grid.
    """
    from PIL import Image

    times = _shown_times(masks[0])
    height, width = frames.shape[1:3]
    cell = (CELL_WIDTH, max(1, round(height * CELL_WIDTH / width)))
    total = len(times) * (cell[0] + GAP) - GAP
    bar = bar_height(MIN_PANEL_WIDTH)
    picture = Image.new("RGB", (total, len(masks) * (bar + cell[1] + GAP) + bar), BACKGROUND)
    for number, mask in enumerate(masks):
        y = number * (bar + cell[1] + GAP)
        picture.paste(Image.fromarray(label_bar(_label(mask), total, bar)), (0, y))
        detail = mask.over_frames(mask.detail()[:, 0].mean(0))
        query = mask.query_tokens(mask.first_row)
        for column, time in enumerate(times):
            frame = frames[frame_of(time, mask.grid[0], len(frames))]
            tile = _draw_frame(frame, detail[time], query[time], cell)
            picture.paste(tile, (column * (cell[0] + GAP), y + bar))
    _draw_legend(picture, picture.height - bar, bar)
    return picture


def frame_of(time: int, latent_frames: int, frames: int) -> int:
    """The decoded frame that a latent frame ends with."""
    return round(time * (frames - 1) / (latent_frames - 1)) if latent_frames > 1 else 0


def _shown_times(mask: BlockMask) -> list[int]:
    """A few latent frames, spread evenly, and among them the one in which most of the queries are."""
    times = evenly(mask.grid[0], COLUMNS)
    own = int(mask.query_tokens(mask.first_row).sum((1, 2)).argmax())
    times[min(range(len(times)), key=lambda index: abs(times[index] - own))] = own
    return times


def _label(mask: BlockMask) -> Label:
    detail = mask.detail()
    heads = f"mean of {len(detail)} heads" if len(detail) > 1 else f"head {mask.first_head}"
    facts = (f"step {mask.step + 1} of {mask.steps}", heads, f"density of these queries {detail[:, 0].mean():.2f}")
    return Label(mask.layer, facts)


def _draw_frame(frame: np.ndarray, detail: np.ndarray, query: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    from PIL import Image, ImageDraw

    small = Image.fromarray(to_uint8(frame)).resize(cell, Image.Resampling.LANCZOS)
    grey = np.asarray(small.convert("L"), np.float32)[..., None].repeat(3, -1) * 0.6
    rows = np.arange(cell[1]) * detail.shape[0] // cell[1]
    columns = np.arange(cell[0]) * detail.shape[1] // cell[0]
    value = detail[rows][:, columns]
    # The frame stays visible: its lightness also modulates the colour over it.
    shade = 0.65 + 0.35 * grey / 153
    mixed = np.where(value[..., None] > 0, 0.25 * grey + 0.75 * ramp(value) * shade, grey)
    tile = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(tile)
    for line in _outline(query, cell):
        draw.line(line, fill=QUERY_COLOUR, width=2)
    return tile


def ramp(values: np.ndarray) -> np.ndarray:
    """Colours of values from 0 to 1: [..., 3]."""
    places = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(values, places, [colour[channel] for colour in RAMP]) for channel in range(3)], -1)


def _outline(tokens: np.ndarray, cell: tuple[int, int]) -> list[tuple[float, float, float, float]]:
    """The borders between tokens inside and outside a set, as lines in pixels."""
    x_scale, y_scale = cell[0] / tokens.shape[1], cell[1] / tokens.shape[0]
    padded = np.pad(tokens, 1)
    lines = []
    for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append((x * x_scale, (y - 1) * y_scale, x * x_scale, y * y_scale))
    for y, x in np.argwhere(padded[1:] != padded[:-1]):
        lines.append(((x - 1) * x_scale, y * y_scale, x * x_scale, y * y_scale))
    return lines


def _draw_legend(picture: Image.Image, y: int, height: int) -> None:
    from PIL import Image, ImageDraw

    draw, text = ImageDraw.Draw(picture), font(round(height * 0.45))
    middle, x, swatch = y + height / 2, height // 3, round(height * 0.5)

    def write(words: str) -> None:
        nonlocal x
        draw.text((x, middle), words, font=text, fill=FACT_COLOUR, anchor="lm")
        x += round(text.getlength(words)) + swatch

    draw.rectangle((x, middle - swatch / 2, x + swatch, middle + swatch / 2), outline=QUERY_COLOUR, width=2)
    x += round(1.5 * swatch)
    write("the queries")
    write("read: little")
    x -= swatch // 2
    bar = ramp(np.linspace(0, 1, 6 * swatch))[None].repeat(swatch, 0)
    picture.paste(Image.fromarray(bar.astype(np.uint8)), (x, round(middle - swatch / 2)))
    x += round(6.5 * swatch)
    write("exactly; grey: not at all")
