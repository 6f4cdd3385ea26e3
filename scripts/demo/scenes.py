"""Random scenes, and where their objects are at every moment.

Lengths are fractions of the clip's side, time runs from 0 to 1 over the clip: one scene renders at any size and length.
"""

import math
import random

from demo.captions import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    COLOURS,
    DRIFTING_BACKGROUNDS,
    MOTIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Background,
    Scene,
    Thing,
    is_held_out,
)

RADIUS = {"small": 0.135, "large": 0.21}
TRAVEL = 0.44  # of a straight motion, over the whole clip
CIRCLING_RADIUS, CIRCLING_TURNS = 0.15, 0.9
BOUNCE_HEIGHT, BOUNCES = 0.17, 2
GROWTH = 1.8  # last radius over first radius of "growing"
MARGIN = 0.02

_TEXTURE_WEIGHTS = (40, 20, 20, 20)
_MOTION_WEIGHTS = (14, 14, 14, 14, 13, 13, 9, 9)
_BACKGROUND_WEIGHTS = (18, 28, 32, 22)
_MOVES = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}


def sample_scenes(
    count: int, seed: int, *, held_out: bool = False, two_things: float = 0.25, apart: bool = True
) -> list[Scene]:
    """`count` random scenes; a seed fixes them.

    With `held_out` every thing is a combination that training never shows, else none is. `two_things`: share of scenes
    with two objects; `apart`: look for places where they do not overlap.
    """
    rng = random.Random(seed)
    return [_sample_scene(rng, held_out, two=rng.random() < two_things, apart=apart) for _ in range(count)]


def position(thing: Thing, time: float) -> tuple[float, float, float]:
    """Centre x, y (y down) and radius of a thing at a time in 0..1, as fractions of the side."""
    radius = RADIUS[thing.size]
    offset_x = offset_y = 0.0
    reach_x = reach_y = 0.0
    if thing.motion in _MOVES:
        direction_x, direction_y = _MOVES[thing.motion]
        offset_x, offset_y = direction_x * TRAVEL * (time - 0.5), direction_y * TRAVEL * (time - 0.5)
        reach_x, reach_y = abs(direction_x) * TRAVEL / 2, abs(direction_y) * TRAVEL / 2
    elif thing.motion == "circling":  # clockwise, from the top
        angle = 2 * math.pi * CIRCLING_TURNS * time
        offset_x, offset_y = CIRCLING_RADIUS * math.sin(angle), -CIRCLING_RADIUS * math.cos(angle)
        reach_x = reach_y = CIRCLING_RADIUS
    elif thing.motion == "bouncing":
        offset_y = BOUNCE_HEIGHT * (0.5 - abs(math.sin(math.pi * BOUNCES * time)))
        reach_y = BOUNCE_HEIGHT / 2
    elif thing.motion == "growing":
        radius *= GROWTH ** (time - 0.5)
    elif thing.motion == "shrinking":
        radius *= GROWTH ** (0.5 - time)
    largest = RADIUS[thing.size] * (GROWTH**0.5 if thing.motion in ("growing", "shrinking") else 1)
    room_x = max(0.0, 0.5 - MARGIN - largest - reach_x)
    room_y = max(0.0, 0.5 - MARGIN - largest - reach_y)
    return 0.5 + thing.x * room_x + offset_x, 0.5 + thing.y * room_y + offset_y, radius


def _sample_scene(rng: random.Random, held_out: bool, two: bool, apart: bool) -> Scene:
    things = [_sample_thing(rng, held_out, COLOURS)]
    if two:
        others = tuple(colour for colour in COLOURS if colour != things[0].colour)
        things.append(_sample_thing(rng, held_out, others))
        if apart:
            things = _apart(rng, things)
    taken = {thing.colour for thing in things}
    kind = rng.choices(BACKGROUNDS, _BACKGROUND_WEIGHTS)[0]
    background = Background(
        colour=rng.choice([colour for colour in BACKGROUND_COLOURS if colour not in taken]),
        kind=kind,
        dark=rng.random() < 0.3,
        drifting=kind in DRIFTING_BACKGROUNDS and rng.random() < 0.25,
    )
    return Scene(tuple(things), background)


def _sample_thing(rng: random.Random, held_out: bool, colours: tuple[str, ...]) -> Thing:
    while True:
        thing = Thing(
            colour=rng.choice(colours),
            texture=rng.choices(TEXTURES, _TEXTURE_WEIGHTS)[0],
            shape=rng.choice(SHAPES),
            motion=rng.choices(MOTIONS, _MOTION_WEIGHTS)[0],
            size=rng.choice(SIZES),
            x=rng.uniform(-1, 1),
            y=rng.uniform(-1, 1),
        )
        if is_held_out(thing) == held_out:
            return thing


def _apart(rng: random.Random, things: list[Thing], attempts: int = 24) -> list[Thing]:
    """The same two things, moved to the tried places where they overlap least."""
    best, best_gap = things, -math.inf
    for _ in range(attempts):
        moved = [_moved(thing, rng.uniform(-1, 1), rng.uniform(-1, 1)) for thing in things]
        gap = min(_gap(*moved, time / 6) for time in range(7))
        if gap > best_gap:
            best, best_gap = moved, gap
    return best


def _moved(thing: Thing, x: float, y: float) -> Thing:
    return Thing(thing.colour, thing.texture, thing.shape, thing.motion, thing.size, x, y)


def _gap(first: Thing, second: Thing, time: float) -> float:
    x1, y1, radius1 = position(first, time)
    x2, y2, radius2 = position(second, time)
    return math.hypot(x1 - x2, y1 - y2) - radius1 - radius2
