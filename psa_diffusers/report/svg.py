"""The report's pictures as inline SVG: curves, and a map of one value per layer and step.

Colours of lines and text come from the page's style sheet (classes `axis`, `grid`, `line-0`, `line-1`), so that a
picture follows the page into dark mode. All text is escaped.
"""

import base64
import io
import math
from collections.abc import Sequence
from html import escape

import numpy as np

Values = Sequence[float | None]

PLOT_WIDTH, PLOT_HEIGHT = 560, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 36
# From skipped (pale) to dense (dark); even steps in lightness, readable on white and on black.
MAP_COLOURS = ((233, 241, 245), (150, 203, 205), (68, 152, 168), (38, 98, 137), (32, 42, 92))


def line_plot(
    series: Sequence[tuple[str, Values]], x_label: str, y_label: str, *, span: float = 0.0, from_zero: bool = False
) -> str:
    """Curves over 1, 2, 3, ...; a None is a gap. The n-th of `series` has the n-th colour, also if others are empty.

    Args:
        span: the vertical axis covers at least this much, so that a small ripple does not look like a storm.
        from_zero: it starts at zero, for quantities whose ratio matters.
    """
    known = [value for _, values in series for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    middle = (min(known) + max(known)) / 2
    low, high = min(min(known), middle - span / 2), max(max(known), middle + span / 2)
    ticks = nice_ticks(0.0 if from_zero else low, high)
    low, high = ticks[0], ticks[-1]
    count = max(len(values) for _, values in series)

    def x_of(index: int) -> float:
        return LEFT + (PLOT_WIDTH - LEFT - RIGHT) * (index / (count - 1) if count > 1 else 0.5)

    def y_of(value: float) -> float:
        return TOP + (PLOT_HEIGHT - TOP - BOTTOM) * (high - value) / ((high - low) or 1)

    parts = [_open(PLOT_WIDTH, PLOT_HEIGHT, f"{y_label} over {x_label}")]
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{PLOT_WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{tick:.10g}", "end"))
    for index in _few(count):
        parts.append(_text(x_of(index), PLOT_HEIGHT - BOTTOM + 16, str(index + 1), "middle"))
    for number, (_, values) in enumerate(series):
        for run in _unbroken(values):
            points = [f"{x_of(index):.1f},{y_of(value):.1f}" for index, value in run]
            if len(points) == 1:
                centre_x, centre_y = points[0].split(",")
                parts.append(f'<circle class="dot-{number}" cx="{centre_x}" cy="{centre_y}" r="3"/>')
            else:
                parts.append(f'<polyline class="line-{number}" points="{" ".join(points)}"/>')
    parts.append(_text(PLOT_WIDTH - RIGHT, PLOT_HEIGHT - 4, x_label, "end"))
    return "".join([*parts, "</svg>"])


def value_map(rows: Sequence[Values], x_label: str, y_label: str) -> str:
    """A map of values in [0, 1], `rows[step][layer]`: steps left to right, layers top to bottom; None is blank."""
    steps, layers = len(rows), max((len(row) for row in rows), default=0)
    if not steps or not layers:
        return ""
    height = min(360, max(150, layers * 14))
    inner_width = PLOT_WIDTH - LEFT - RIGHT
    parts = [_open(PLOT_WIDTH, height + TOP + BOTTOM, f"{y_label} by {x_label}")]
    parts.append(
        f'<image class="map" x="{LEFT}" y="{TOP}" width="{inner_width}" height="{height}" preserveAspectRatio="none" '
        f'href="{_map_image(rows, steps, layers)}"/>'
    )
    for index in _few(layers):
        parts.append(_text(LEFT - 8, TOP + height * (index + 0.5) / layers + 4, str(index), "end"))
    for index in _few(steps):
        parts.append(_text(LEFT + inner_width * (index + 0.5) / steps, TOP + height + 16, str(index + 1), "middle"))
    parts.append(_text(PLOT_WIDTH - RIGHT, TOP + height + BOTTOM - 4, x_label, "end"))
    parts.append(_text(0, TOP + height + BOTTOM - 4, y_label, "start"))
    return "".join([*parts, "</svg>"])


def map_gradient() -> str:
    """The map's colours from 0 to 1 as a CSS gradient."""
    colours = ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in MAP_COLOURS)
    return f"linear-gradient(to right, {colours})"


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    span = high - low
    if span <= 0:
        span = abs(high) * 0.1 or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if start == end:
        end += 1
    return [round(index * step, 12) for index in range(start, end + 1)]


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as a URI that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _map_image(rows: Sequence[Values], steps: int, layers: int) -> str:
    from PIL import Image

    values = np.full((layers, steps), np.nan)
    for step, row in enumerate(rows):
        for layer, value in enumerate(row):
            values[layer, step] = np.nan if value is None else value
    known = np.nan_to_num(values).clip(0, 1)
    places = np.linspace(0, 1, len(MAP_COLOURS))
    colours = [np.interp(known, places, [colour[channel] for colour in MAP_COLOURS]) for channel in range(3)]
    alpha = np.where(np.isnan(values), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([*colours, alpha], axis=-1).round().astype(np.uint8)).save(buffer, "PNG")
    return data_uri("image/png", buffer.getvalue())


def _few(count: int, wanted: int = 9) -> list[int]:
    stride = max(1, math.ceil(count / wanted))
    stride = next((nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500) if nice >= stride), stride)
    return list(range(0, count, stride))


def _unbroken(values: Values) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((index, value))
    return [run for run in runs if run]


def _open(width: float, height: float, title: str) -> str:
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
