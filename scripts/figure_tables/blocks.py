"""The marked blocks of README and docs, by name."""

from __future__ import annotations

from collections.abc import Callable

from figure_tables import budget, causal, modalities, models, operator, quality, short, sol

BLOCKS: dict[str, Callable[[], str]] = {
    "headline": models.headline,
    "demo": models.demo,
    "cpu": operator.cpu,
    "operator": operator.gpu,
    "authors": operator.authors,
    "portable": operator.portable,
    "int8": operator.int8,
    "int8-beside": operator.int8_beside,
    "budget": operator.budget,
    "host": operator.host,
    "host-again": operator.host_again,
    "launch": operator.launch,
    "stages": operator.stages,
    "power": operator.power,
    "scaling": operator.scaling,
    "model": models.whole,
    "parallel": models.parallel,
    "parallel-exchange": models.parallel_exchange,
    "prompts": models.prompts,
    "stack": models.stack,
    "whole-run": models.whole_run,
    "whole-run-lines": models.whole_run_lines,
    "blocks": models.blocks,
    "short-blocks": models.short_blocks,
    "calibration": models.calibration,
    "causal": causal.causal,
    "flex-prefill": causal.flex_prefill,
    "price": budget.price,
    "correction-cost": budget.correction_cost,
    "understanding": causal.understanding,
    "held-out": quality.held_out,
    "corrected": quality.corrected,
    "graphs": short.graphs,
    "generate": short.generate,
    "short": short.short,
    "float32": short.float32,
    "sol": sol.compared,
    "sol-ahead": sol.ahead,
    "rival": sol.rival,
    "modalities": modalities.errors,
    "modalities-answer": modalities.answer,
    "needles": modalities.needles,
}
