"""Renders scenes as anti-aliased videos, many at a time, on any device."""

import math
from collections.abc import Callable, Sequence

import torch
from demo.captions import BACKGROUNDS, SHAPES, TEXTURES, Scene, Thing
from demo.scenes import position

PALETTE = {  # of the objects, sRGB
    "red": "#E23B3B",
    "orange": "#F5882B",
    "yellow": "#F7CB15",
    "green": "#35A853",
    "cyan": "#10B9C6",
    "blue": "#2F6BE8",
    "purple": "#8A4BD6",
    "pink": "#F268AC",
    "gray": "#8E929A",
}
PAPER, NIGHT = "#FBF8F2", "#14161F"  # what backgrounds are mixed with: soft in the light, deep in the dark
CHECKER_CELL = 1 / 8
STRIPE_PERIOD = 1 / 6
DRIFT = 1 / 8  # of the side, to the left, over the clip
SHADOW_OFFSET = (0.018, 0.035)
SHADOW_SOFTNESS = 0.06


def render(scenes: Sequence[Scene], frames: int, side: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Videos of `scenes`, float32 [len(scenes), 3, frames, side, side] in -1..1."""
    axis = (torch.arange(side, device=device) + 0.5) / side
    y, x = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)
    time = torch.linspace(0, 1, frames, device=device).view(1, -1, 1, 1)
    video = _backgrounds(scenes, x, y, time, side)
    dark = torch.tensor([scene.background.dark for scene in scenes], device=device)
    for layer in range(max(len(scene.things) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > layer]
        things = [scenes[row].things[layer] for row in rows]
        video[rows] = _draw(things, video[rows], dark[rows], x, y, frames, side)
    return video.clamp(0, 1) * 2 - 1


def rgb(code: str) -> tuple[float, float, float]:
    """ "#RRGGBB" as three floats in 0..1."""
    return tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _backgrounds(
    scenes: Sequence[Scene], x: torch.Tensor, y: torch.Tensor, time: torch.Tensor, side: int
) -> torch.Tensor:
    """[n, 3, frames, side, side] in 0..1."""
    backgrounds = [scene.background for scene in scenes]
    device = x.device
    first, second = (
        torch.tensor([_background_tones(b.colour, b.kind, b.dark)[i] for b in backgrounds], device=device)
        for i in (0, 1)
    )
    drift = torch.tensor([DRIFT * b.drifting for b in backgrounds], device=device).view(-1, 1, 1, 1) * time
    mix = torch.zeros(len(scenes), time.shape[1], y.shape[2], x.shape[3], device=device)
    for kind in BACKGROUNDS:
        rows = [row for row, b in enumerate(backgrounds) if b.kind == kind]
        if not rows:
            continue
        u = x + drift[rows]
        if kind == "checkerboard":
            mix[rows] = _either(_bars(u / CHECKER_CELL / 2, side * CHECKER_CELL * 2),
                                _bars(y / CHECKER_CELL / 2, side * CHECKER_CELL * 2))  # fmt: skip
        elif kind == "stripes":
            mix[rows] = _bars((u + y) / STRIPE_PERIOD, side * STRIPE_PERIOD / math.sqrt(2))
        elif kind == "gradient":
            mix[rows] = (0.3 * x + 0.7 * y).expand_as(mix[rows])
    vignette = 1 - 0.12 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.5
    tones = torch.lerp(first.view(-1, 3, 1, 1, 1), second.view(-1, 3, 1, 1, 1), mix.unsqueeze(1))
    return tones * vignette.unsqueeze(1)


def _background_tones(colour: str, kind: str, dark: bool) -> tuple[list[float], list[float]]:
    """The two tones between which a background alternates."""
    if kind == "gradient":
        shares = (0.16, 0.42) if dark else (0.10, 0.42)
    elif kind == "wall":
        shares = (0.30, 0.30) if dark else (0.26, 0.26)
    else:
        shares = (0.22, 0.36) if dark else (0.15, 0.34)
    ground = rgb(NIGHT if dark else PAPER)
    return tuple([g + share * (c - g) for g, c in zip(ground, rgb(PALETTE[colour]), strict=True)] for share in shares)


def _draw(
    things: Sequence[Thing],
    canvas: torch.Tensor,
    dark: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    frames: int,
    side: int,
) -> torch.Tensor:
    """One thing per clip, with its shadow, painted over `canvas` [n, 3, frames, side, side] in 0..1."""
    device = canvas.device
    times = [frame / max(frames - 1, 1) for frame in range(frames)]
    path = torch.tensor([[position(thing, time) for time in times] for thing in things], device=device)
    centre_x, centre_y, radius = (path[..., i].view(len(things), frames, 1, 1) for i in range(3))
    u, v = torch.broadcast_tensors((x - centre_x) / radius, (y - centre_y) / radius)

    offset_x, offset_y = SHADOW_OFFSET
    below = _distance(things, u - offset_x / radius, v - offset_y / radius) * radius
    strength = torch.where(dark, 0.45, 0.24).view(-1, 1, 1, 1)
    shadow = strength * (1 - _smoothstep(-SHADOW_SOFTNESS, SHADOW_SOFTNESS, below))
    canvas = canvas * (1 - shadow.unsqueeze(1))

    distance = _distance(things, u, v)
    colour = torch.tensor([rgb(PALETTE[thing.colour]) for thing in things], device=device).view(-1, 3, 1, 1, 1)
    tint = torch.lerp(colour, torch.tensor(rgb(PAPER), device=device).view(1, 3, 1, 1, 1), 0.68)
    paint = torch.lerp(colour, tint, _texture(things, u, v, radius * side).unsqueeze(1))
    light = 1 - 0.07 * (0.5 * u + 0.8 * v).clamp(-1, 1)  # from the upper left
    rim = 0.86 + 0.14 * _smoothstep(0.0, 0.22, -distance)
    gloss = 0.20 * torch.exp(-((u + 0.32) ** 2 + (v + 0.38) ** 2) / 0.10)
    paint = paint * (light * rim).unsqueeze(1)
    paint = paint + (1 - paint) * gloss.unsqueeze(1)
    coverage = (0.5 - distance * radius * side).clamp(0, 1)
    return torch.lerp(canvas, paint, coverage.unsqueeze(1))


def _texture(things: Sequence[Thing], u: torch.Tensor, v: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """How much of the lighter tint shows, 0..1; `pixels` is the radius in pixels, for edges one pixel wide."""
    tint = torch.zeros_like(u)
    for texture in TEXTURES[1:]:
        rows = [row for row, thing in enumerate(things) if thing.texture == texture]
        if not rows:
            continue
        a, b, scale = u[rows], v[rows], pixels[rows]
        if texture == "striped":
            period = 0.62
            tint[rows] = _bars((a + b) / math.sqrt(2) / period + 0.25, scale * period)
        elif texture == "checkered":
            period = 0.92
            tint[rows] = _either(_bars(a / period, scale * period), _bars(b / period, scale * period))
        else:
            period, size = 0.60, 0.185
            a, b = ((c / period + 0.5).frac_() for c in (a + 30 * period, b + 30 * period))
            distance = torch.hypot(a - 0.5, b - 0.5) * period - size
            tint[rows] = (0.5 - distance * scale).clamp(0, 1)
    return tint


def _bars(phase: torch.Tensor, period_pixels: torch.Tensor | float) -> torch.Tensor:
    """A square wave of `phase` (period 1), 0..1, its edges one pixel wide."""
    triangle = ((phase - phase.floor()) - 0.5).abs() - 0.25
    return (0.5 + triangle * period_pixels).clamp(0, 1)


def _either(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + second - 2 * first * second


def _smoothstep(low: float, high: float, value: torch.Tensor) -> torch.Tensor:
    share = ((value - low) / (high - low)).clamp(0, 1)
    return share * share * (3 - 2 * share)


def _distance(things: Sequence[Thing], u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance to each thing's outline in units of its radius, negative inside."""
    distance = torch.empty_like(u)
    for shape in SHAPES:
        rows = [row for row, thing in enumerate(things) if thing.shape == shape]
        if rows:
            distance[rows] = _OUTLINES[shape](u[rows], v[rows])
    return distance


def _circle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.hypot(u, v) - 1


def _square(u: torch.Tensor, v: torch.Tensor, half: float = 0.86, corner: float = 0.2) -> torch.Tensor:
    a, b = u.abs() - half + corner, v.abs() - half + corner
    return torch.hypot(a.clamp(min=0), b.clamp(min=0)) + torch.maximum(a, b).clamp(max=0) - corner


def _triangle(u: torch.Tensor, v: torch.Tensor, half: float = 0.90, corner: float = 0.14) -> torch.Tensor:
    """Equilateral, one tip up: folded into one edge."""
    k = math.sqrt(3)
    a, b = u.abs() - half, -(v - 0.16) + half / k
    fold = a + k * b > 0
    a, b = torch.where(fold, (a - k * b) / 2, a), torch.where(fold, (-k * a - b) / 2, b)
    a = a - a.clamp(-2 * half, 0)
    return -torch.hypot(a, b) * torch.sign(b) - corner


def _star(
    u: torch.Tensor, v: torch.Tensor, tip: float = 0.98, waist: float = 0.56, corner: float = 0.08
) -> torch.Tensor:
    """Five tips, one up: folded into half a tip, whose edge runs from the tip to the waist."""
    sector = math.pi / 5
    angle = torch.atan2(u, -v)
    angle = (angle + sector) % (2 * sector) - sector
    length = torch.hypot(u, v)
    a, b = length * torch.sin(angle).abs(), length * torch.cos(angle)
    edge_a, edge_b = waist * math.sin(sector), waist * math.cos(sector) - tip
    share = ((a * edge_a + (b - tip) * edge_b) / (edge_a**2 + edge_b**2)).clamp(0, 1)
    distance = torch.hypot(a - share * edge_a, b - tip - share * edge_b)
    outside = torch.sign(-(a * edge_b - (b - tip) * edge_a))
    return distance * outside - corner


def _heart(u: torch.Tensor, v: torch.Tensor, scale: float = 1.62) -> torch.Tensor:
    """Two quarter discs over a square that stands on its corner, its lowest point at (0, 0) before the shift."""
    a, b = u.abs() / scale, (0.92 - v) / scale
    upper = torch.hypot(a - 0.25, b - 0.75) - math.sqrt(2) / 4
    along = 0.5 * (a + b).clamp(min=0)
    lower = torch.minimum(torch.hypot(a, b - 1), torch.hypot(a - along, b - along)) * torch.sign(a - b)
    return torch.where(a + b > 1, upper, lower) * scale


_OUTLINES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}
