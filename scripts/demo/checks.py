"""Looks at a video's pixels: which objects are in it, and how they move.

Backgrounds are pale or dim by design, objects vivid, so a pixel with much chroma and lightness (in OKLab) belongs to an
object, and the nearest palette colour names it. Nothing else is known about the video: neither the prompt nor where an
object should be.
"""

import math
from dataclasses import dataclass

import torch
from demo.captions import COLOURS, Scene
from demo.videos import PALETTE, rgb

VIVID_CHROMA, MIN_LIGHTNESS = 0.09, 0.43  # dim backgrounds have chroma too, but are darker than any object
MIN_AREA = 0.004  # of the frame: fewer pixels of a colour are no object
MIN_TRAVEL = 0.15  # of the side


@dataclass(frozen=True)
class Sighting:
    """One object as the pixels show it: its colour, mean share of the frame, and motion (None: none recognised)."""

    colour: str
    area: float
    motion: str | None


@dataclass(frozen=True)
class Verdict:
    """How many of a scene's objects were seen with the asked colour, and with the asked motion too."""

    things: int
    colours_right: int
    motions_right: int


def judge(found: list[Sighting], scene: Scene) -> Verdict:
    """Compares what was seen in a video (see `sightings`) with what its scene asked for.

    An object's colour is right if it is among the video's n largest, n being the number of objects asked for; a motion
    can only be right where the colour is.
    """
    seen = {sighting.colour: sighting for sighting in found[: len(scene.things)]}
    coloured = [thing for thing in scene.things if thing.colour in seen]
    moving = [thing for thing in coloured if seen[thing.colour].motion == thing.motion]
    return Verdict(len(scene.things), len(coloured), len(moving))


def sightings(video: torch.Tensor) -> list[Sighting]:
    """The objects of a video [3, frames, height, width] in -1..1, one per vivid colour, the largest first."""
    labels = _colour_labels((video[..., ::2, ::2].float() + 1) / 2)  # every other pixel is plenty
    found = []
    for index, colour in enumerate(COLOURS):
        mask = (labels == index).float()
        area = mask.mean(dim=(1, 2))
        if area.mean() >= MIN_AREA:
            found.append(Sighting(colour, area.mean().item(), _motion(mask, area)))
    return sorted(found, key=lambda sighting: -sighting.area)


def oklab(pixels: torch.Tensor) -> torch.Tensor:
    """sRGB [3, ...] in 0..1 to OKLab [3, ...] (lightness, green to red, blue to yellow)."""
    linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    cones = _mix(_TO_CONES, linear).clamp(min=0) ** (1 / 3)
    return _mix(_TO_LAB, cones)


def _colour_labels(pixels: torch.Tensor) -> torch.Tensor:
    """Index into COLOURS per pixel, [frames, height, width], -1 where nothing vivid is."""
    lightness, a, b = oklab(pixels)
    palette = oklab(torch.tensor([rgb(PALETTE[colour]) for colour in COLOURS], device=pixels.device).T)
    chroma = torch.hypot(a, b)
    stretch = 1 / chroma.clamp(min=1e-6)
    distances = []
    for palette_lightness, palette_a, palette_b in palette.T:
        size = torch.hypot(palette_a, palette_b)
        hue = torch.hypot(a * stretch - palette_a / size, b * stretch - palette_b / size)
        distances.append(hue + 0.3 * (lightness - palette_lightness).abs())
    nearest = torch.stack(distances).argmin(0)
    return nearest.masked_fill((chroma < VIVID_CHROMA) | (lightness < MIN_LIGHTNESS), -1)


def _motion(mask: torch.Tensor, area: torch.Tensor) -> str | None:
    """The motion word that the path of a mask [frames, height, width] and its share of each frame [frames] fit."""
    frames, height, width = mask.shape
    if frames < 5 or (area < MIN_AREA / 4).any():
        return None
    y = (mask.sum(2) @ torch.arange(height, device=mask.device, dtype=mask.dtype)) / mask.sum(dim=(1, 2)) / height
    x = (mask.sum(1) @ torch.arange(width, device=mask.device, dtype=mask.dtype)) / mask.sum(dim=(1, 2)) / width
    end = max(1, frames // 8)
    net_x, net_y = ((path[-end:].mean() - path[:end].mean()).item() for path in (x, y))
    range_x, range_y = ((path.max() - path.min()).item() for path in (x, y))
    if max(abs(net_x), abs(net_y)) >= MIN_TRAVEL and max(range_x, range_y) <= 1.3 * math.hypot(net_x, net_y):
        if abs(net_x) >= 2 * abs(net_y):
            return "moving right" if net_x > 0 else "moving left"
        if abs(net_y) >= 2 * abs(net_x):
            return "moving down" if net_y > 0 else "moving up"
        return None
    if min(range_x, range_y) >= 0.12 and _clockwise_turns(x, y) >= 0.5:
        return "circling"
    if range_y >= 0.08 and range_x <= 0.5 * range_y and _reversals(y, 0.5 * range_y) >= 2:
        return "bouncing"
    growth = (area[-end:].mean() / area[:end].mean()).item()
    if max(range_x, range_y) <= 0.12 and not 1 / 1.5 < growth < 1.5:
        return "growing" if growth > 1 else "shrinking"
    return None


def _clockwise_turns(x: torch.Tensor, y: torch.Tensor) -> float:
    """Turns of a path around the middle of its extent; y points down, so clockwise is positive."""
    angle = torch.atan2(y - (y.max() + y.min()) / 2, x - (x.max() + x.min()) / 2)
    steps = angle.diff()
    return (torch.remainder(steps + math.pi, 2 * math.pi) - math.pi).sum().item() / (2 * math.pi)


def _reversals(path: torch.Tensor, least: float) -> int:
    """How often a path turns back by at least `least`."""
    values = path.tolist()
    low = high = values[0]
    direction, count = 0, 0
    for value in values[1:]:
        low, high = min(low, value), max(high, value)
        if direction >= 0 and high - value >= least:
            count, direction, low = count + (direction > 0), -1, value
            high = value
        elif direction <= 0 and value - low >= least:
            count, direction, high = count + (direction < 0), 1, value
            low = value
    return count


def _mix(matrix: tuple[tuple[float, ...], ...], channels: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(matrix, device=channels.device)
    return (weights @ channels.flatten(1)).view(channels.shape)


_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
