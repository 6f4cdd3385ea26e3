"""Prompts that the demo model was never trained on, in the demo's grammar, which other models read as well."""

from __future__ import annotations

from dataclasses import replace

from demo.captions import caption
from demo.scenes import sample_scenes

TWO_THINGS = 0.25


def prompts_for(count: int, seed: int, content: str | None = None) -> list[str]:
    """`count` captions; `content` puts the same objects over backgrounds of one kind, which do not drift."""
    scenes = sample_scenes(count, seed, held_out=True, two_things=TWO_THINGS)
    if content is not None:
        scenes = [
            replace(scene, background=replace(scene.background, kind=content, drifting=False)) for scene in scenes
        ]
    return [caption(scene) for scene in scenes]
