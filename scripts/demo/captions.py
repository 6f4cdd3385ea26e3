"""What a demo clip shows, and the sentence that says so.

    a [small|large] COLOUR [solid|striped|checkered|dotted] SHAPE MOTION [and a ...]
        over a [drifting] [dark] COLOUR wall|gradient|checkerboard      (or: over ... COLOUR stripes)

Without a texture word an object is solid; size, motion and background may be left out and are then the model's choice.
"""

import itertools
import random
import zlib
from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUND_COLOURS = (*COLOURS, "gray")
SHAPES = ("circle", "square", "triangle", "star", "heart")
TEXTURES = ("solid", "striped", "checkered", "dotted")
SIZES = ("small", "large")
DIRECTIONS = ("moving left", "moving right", "moving up", "moving down")
MOTIONS = (*DIRECTIONS, "circling", "bouncing", "growing", "shrinking")
BACKGROUNDS = ("wall", "gradient", "checkerboard", "stripes")
DRIFTING_BACKGROUNDS = ("checkerboard", "stripes")

_LETTERS_WITH_AN = "aeiou"


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` in -1..1 place its path within the room that size and motion leave."""

    colour: str
    texture: str
    shape: str
    motion: str
    size: str
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Background:
    colour: str
    kind: str
    dark: bool = False
    drifting: bool = False


@dataclass(frozen=True)
class Scene:
    """A clip: one or two things (the later one in front) over a background."""

    things: tuple[Thing, ...]
    background: Background


def words() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    grammar = ("a", "an", "and", "over", "dark", "drifting", *SIZES, *TEXTURES, *BACKGROUND_COLOURS, *SHAPES)
    phrases = itertools.chain.from_iterable(motion.split() for motion in MOTIONS)
    return list(dict.fromkeys((*grammar, *phrases, *BACKGROUNDS)))


def is_held_out(thing: Thing) -> bool:
    """True for the eighth of all colour, texture, shape and motion combinations that training never shows."""
    name = f"{thing.colour} {thing.texture} {thing.shape} {thing.motion}"
    return zlib.crc32(name.encode()) % 8 == 0


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The full sentence for a scene; with `rng`, one of the shorter or looser ways to say it, as people do."""

    def dropped(share: float) -> bool:
        return rng is not None and rng.random() < share

    phrases = []
    for thing in scene.things:
        parts = []
        if not dropped(0.15):
            parts.append(thing.size)
        parts.append(thing.colour)
        if thing.texture != "solid" or (rng is not None and rng.random() < 0.3):
            parts.append(thing.texture)
        parts.append(thing.shape)
        if not dropped(0.04):
            parts.append(thing.motion)
        phrases.append(_with_article(parts))
    sentence = " and ".join(phrases)
    if not dropped(0.08):
        sentence += f" over {_background_phrase(scene.background)}"
    if dropped(0.03):  # an unknown word here and there teaches that such words mean nothing
        tokens = sentence.split()
        tokens.insert(rng.randrange(len(tokens) + 1), "something")
        sentence = " ".join(tokens)
    return sentence


def _background_phrase(background: Background) -> str:
    parts = ["drifting"] * background.drifting + ["dark"] * background.dark + [background.colour, background.kind]
    return " ".join(parts) if background.kind == "stripes" else _with_article(parts)


def _with_article(parts: list[str]) -> str:
    article = "an" if parts[0][0] in _LETTERS_WITH_AN else "a"
    return " ".join([article, *parts])
