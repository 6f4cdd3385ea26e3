"""Runs of `psa-generate` on tiny random pipelines; the fixture `ask` makes their requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from psa_diffusers.runs import generate
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request

STEPS, FRAMES, SIZE, LAYERS = 4, 5, 64, 2


def carry_out(request: Request) -> dict[str, Any]:
    """What `psa-generate` does with the request; its summary."""
    summary = generate.run(make_plan(request))
    assert summary is not None, "only one of several processes has none"
    return summary


def contents(folder: Path) -> list[str]:
    """Names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def edit_pipeline(monkeypatch: Any, edit: Callable[[Any], None]) -> None:
    """Runs `edit(pipe)` on every pipeline that is loaded."""
    load = generate.load_pipeline

    def load_and_edit(*arguments: Any, **settings: Any) -> Any:
        pipe = load(*arguments, **settings)
        edit(pipe)
        return pipe

    monkeypatch.setattr(generate, "load_pipeline", load_and_edit)
