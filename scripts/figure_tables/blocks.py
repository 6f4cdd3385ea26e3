"""The marked blocks of README and docs, by name."""

from __future__ import annotations

from collections.abc import Callable

from figure_tables import models, operator, quality, short, sol

BLOCKS: dict[str, Callable[[], str]] = {
    "headline": models.headline,
    "demo": models.demo,
    "cpu": operator.cpu,
    "operator": operator.gpu,
    "authors": operator.authors,
    "portable": operator.portable,
    "int8": operator.int8,
    "budget": operator.budget,
    "host": operator.host,
    "launch": operator.launch,
    "stages": operator.stages,
    "power": operator.power,
    "scaling": operator.scaling,
    "model": models.whole,
    "parallel": models.parallel,
    "blocks": models.blocks,
    "short-blocks": models.short_blocks,
    "calibration": models.calibration,
    "held-out": quality.held_out,
    "short": short.short,
    "float32": short.float32,
    "sol": sol.compared,
    "sol-ahead": sol.ahead,
}
