"""All ways of attending, on all texts of one length."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from kept_rows import Record, Row
from language_eval.errors import relative_error
from language_eval.models import last_tokens, token_losses
from language_eval.needles import plant
from language_eval.texts import Text
from language_eval.ways import Way, density_of_noise, kept_blocks, value_for

from psa_diffusers.errors import InputError
from psa_transformers import PSAHandle, apply_psa

DENSE = {"method": "dense", "kept": None, "target": None, "dense_last": None, "density": None}
OUT_OF_REACH = "out of reach"  # the task of rows that say which densities a way cannot have


class OutOfTime(Exception):
    """The time limit is over; what was measured is kept."""


class Evaluation:
    """All ways on all texts of one length.

    Args:
        deadline: of `time.monotonic`; nothing is begun after it.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        record: Record,
        model: Any,
        tokenizer: Any,
        tokens: int,
        texts: Sequence[Text],
        deadline: float = float("inf"),
    ) -> None:
        self._options, self._record, self._model, self._tokens = options, record, model, tokens
        self._deadline = deadline
        self._texts = [(text.name, text.ids.to(model.device)) for text in texts]
        self._needles = {
            (text.name, depth, planted): plant(text.ids, tokenizer, depth, number, planted)
            for number, text in enumerate(texts)
            for depth in (options.depths if "needle" in options.tasks else ())
            for planted in (True, False)
        }
        self._known = {row["id"]: row for row in record.rows()}
        self._halves: dict[str, tuple[float, float]] = {}
        self._asked: dict[tuple[str, float], float] = {}
        self._densities: dict[tuple[str, bool, float], float] = {}

    def run(self) -> None:
        """Measure what is not in the record yet.

        Raises:
            OutOfTime: the deadline came first.
        """
        for row in self._dense():
            self._keep(row)
        for method, kept, target in product(self._options.methods, self._options.kept, self._options.densities):
            way = Way(method, kept, target)
            value = self._value(way)
            if value is None:
                self._keep(self._row(OUT_OF_REACH, "", {"method": method, "kept": kept, "target": target}))
                continue
            for row in self._sparse(way, value):
                self._keep(row | {"value": value})

    def _keep(self, row: Row) -> None:
        if row["id"] not in self._record:
            self._record.add(row)
            print(json.dumps(row), flush=True)
        self._look_at_clock()

    def _look_at_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTime

    def _dense(self) -> Iterator[Row]:
        """Rows of dense attention, which all others are compared with."""
        for name, ids in self._texts if "loss" in self._options.tasks else ():
            row = self._row("loss", name, DENSE)
            if row["id"] not in self._known:
                whole, half = _halves(token_losses(self._model, ids))
                row |= {"loss": half, "loss_all": whole, "excess": 0.0, "excess_all": 0.0}
            row = self._known.get(row["id"], row)
            self._halves[name] = row["loss_all"], row["loss"]
            yield row
        for (name, depth, planted), needle in self._needles.items():
            way = DENSE if planted else DENSE | {"method": "unplanted"}
            row = self._row("needle", name, way, depth)
            if row["id"] not in self._known:
                loss, found = last_tokens(self._model, needle.ids.to(self._model.device), needle.value)
                excess = 0.0 if planted else loss - self._asked[name, depth]
                row |= {"loss": loss, "found": found, "excess": excess}
            row = self._known.get(row["id"], row)
            if planted:
                self._asked[name, depth] = row["loss"]
            yield row

    def _sparse(self, way: Way, value: float) -> Iterator[Row]:
        about = {"method": way.method, "kept": way.kept, "target": way.target}
        for name, ids in self._texts if "loss" in self._options.tasks else ():
            row = self._row("loss", name, about | {"dense_last": 0})
            if row["id"] not in self._record:
                with self._patched(way, value, 0) as psa:
                    whole, half = _halves(token_losses(self._model, ids))
                dense_whole, dense_half = self._halves[name]
                excess = {"excess": half - dense_half, "excess_all": whole - dense_whole}
                yield row | {"loss": half, "loss_all": whole, **excess, **_figures(psa)}
        for name, ids in self._texts if "error" in self._options.tasks else ():
            row = self._row("error", name, about | {"dense_last": 0})
            if row["id"] not in self._record:
                error, density = relative_error(self._model, ids, way.spec(value, tuple(self._options.block)))
                yield row | {"error": error, "density": density}
        for dense_last, ((name, depth, planted), needle) in product(self._options.dense_last, self._needles.items()):
            row = self._row("needle", name, about | {"dense_last": dense_last}, depth)
            if planted and row["id"] not in self._record:
                with self._patched(way, value, dense_last) as psa:
                    loss, found = last_tokens(self._model, needle.ids.to(self._model.device), needle.value)
                excess = loss - self._asked[name, depth]
                yield row | {"loss": loss, "found": found, "excess": excess, **_figures(psa)}

    @contextmanager
    def _patched(self, way: Way, value: float, dense_last: int) -> Iterator[PSAHandle]:
        preset = way.preset(value, tuple(self._options.block))
        with kept_blocks(way.kept), apply_psa(self._model, preset, min_tokens=0, dense_last=dense_last) as psa:
            yield psa

    def _value(self, way: Way) -> float | None:
        """What the way has to be made with on this length of text: as before, if the record has it."""
        about = {"method": way.method, "kept": way.kept, "target": way.target, "tokens": self._tokens}
        rows = [row for row in self._known.values() if about.items() <= row.items()]
        if rows:
            return rows[0].get("value")
        if way.depends_on_text:
            return value_for(way, lambda value: self._density_of_texts(way, value))
        return value_for(way, lambda value: density_of_noise(way, value, self._tokens, tuple(self._options.block)))

    def _density_of_texts(self, way: Way, value: float) -> float:
        key = (way.method, way.kept, value)
        if key not in self._densities:  # some are asked for again, for other targets
            self._look_at_clock()
            with self._patched(way, value, 0) as psa:
                for _, ids in self._texts[: self._options.calibrate]:
                    self._model.base_model(input_ids=ids[None], use_cache=False)
            self._densities[key] = _figures(psa)["density"]
        return self._densities[key]

    def _row(self, task: str, text: str, way: Row, depth: float | None = None) -> Row:
        about = {"task": task, "tokens": self._tokens, "text": text, **way}
        if depth is not None:
            about["depth"] = depth
        return {"id": json.dumps([value for name, value in about.items() if name != "density"]), **about}


def _halves(losses: torch.Tensor) -> tuple[float, float]:
    """Mean loss of a window, and of its second half."""
    return float(losses.mean()), float(losses[len(losses) // 2 :].mean())


def _figures(psa: PSAHandle) -> Row:
    """What was attended.

    Raises:
        InputError: a call ran dense, so that the figures would not be of what they say.
    """
    stats = psa.stats()
    if stats.fallbacks or stats.density is None:
        raise InputError(f"nothing to measure: calls ran dense ({', '.join(stats.fallbacks) or 'all tokens are text'})")
    return {"density": stats.density, "implementation": stats.implementation}
