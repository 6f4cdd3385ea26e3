"""Multiple choice about videos, answered with dense and with sparse prefills by a vision-language model.

    python scripts/eval_understanding.py --model Qwen/Qwen2.5-VL-7B-Instruct --benchmark FOLDER --output FILE.json
    python scripts/eval_understanding.py --model FOLDER --benchmark FOLDER --preset psa-auto --density 0.25 --output ...

FOLDER holds videos and questions.json, a list of {"id", "video", "question", "options", "answer"} in the form that
docs/understanding.md tells. Each question is put twice, dense and through psa_transformers.apply_psa; the answer is the
option whose letter has the highest logit where the answer begins, so that nothing has to be read out of free text and
no question is without an answer. `said` is the most likely of all tokens.

Answers are kept in a .jsonl file beside the output, a line a question, so that a run can be stopped and goes on; with
other settings it is refused. FILE.json sums them up: accuracy of both, the mean difference with its 95 % interval over
questions, agreement, median seconds of prefills, densities, and why calls ran dense. The first question of a run also
pays for kernels that are compiled, which medians do not show. A video that cannot be read is told and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from kept_rows import Record, Row
from results import document, write
from understanding_eval.answers import choose
from understanding_eval.questions import Question, read_questions

from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.environment import hardware
from psa_diffusers.errors import InputError
from psa_presets import Preset, PresetError, choose_preset
from psa_transformers import apply_psa
from psa_transformers.ask import QuestionError, load, read_frames

WHAT = "multiple choice about videos, dense and sparse prefills, one row a question"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    try:
        preset = choose_preset(options.preset, options.density)
        questions, digest = read_questions(options.benchmark)
        settings = _settings(options, preset, digest)
        with Record(options.output.with_suffix(".jsonl"), settings) as record:
            left = [question for question in questions if question.id not in record]
            if left:
                model, processor = load(options.model, options.device)
                for question in left:
                    record.add(answer(model, processor, question, preset, options))
                    print(json.dumps(record.rows()[-1]), flush=True)
            summary = summed_up(record.rows())
            about = {"settings": settings, "summary": summary}
            write(document(WHAT, record.rows(), device=options.device, commit=options.commit, **about), options.output)
    except (InputError, PresetError, QuestionError) as error:
        sys.exit(f"eval_understanding: error: {error}")
    print(json.dumps(summary, indent=1))


def answer(model: Any, processor: Any, question: Question, preset: Preset, options: argparse.Namespace) -> Row:
    """The row of one question, or why there is none."""
    row: Row = {"id": question.id, "answer": question.answer}
    try:
        frames = read_frames(question.video, options.num_frames)
    except QuestionError as error:
        return row | {"error": str(error)}
    dense = choose(model, processor, frames, question.text(), question.letters)
    about = {"min_tokens": options.min_tokens, "dense_last": options.dense_last, "vision": options.vision}
    with apply_psa(model, preset, **about) as psa:
        sparse = choose(model, processor, frames, question.text(), question.letters)
        stats = psa.stats()
    figures = {"density": stats.density, "vision_density": stats.vision_density, "fallbacks": stats.fallbacks}
    return row | {"dense": asdict(dense), "sparse": asdict(sparse), **figures}


def summed_up(rows: Sequence[Row]) -> Row:
    """Figures over all questions that were answered; None where there are none to take a mean of."""
    done = [row for row in rows if "error" not in row]
    right = {way: [float(row[way]["letter"] == row["answer"]) for row in done] for way in ("dense", "sparse")}
    gained = [sparse - dense for dense, sparse in zip(right["dense"], right["sparse"], strict=True)]
    same = [float(row["dense"]["letter"] == row["sparse"]["letter"]) for row in done]
    densities = [row["density"] for row in done if row["density"] is not None]
    fallbacks: Counter[str] = Counter()
    for row in done:
        fallbacks.update(row["fallbacks"])
    return {
        "questions": len(done),
        "unreadable": len(rows) - len(done),
        "accuracy": {way: _mean(each) for way, each in right.items()},
        "difference": _mean(gained),
        "difference_ci": half_interval(gained),
        "agreement": _mean(same),
        "said_the_letter": {
            way: _mean([float(row[way]["said"].startswith(row[way]["letter"])) for row in done]) for way in right
        },
        "prefill_seconds": {
            way: round(median(row[way]["prefill_seconds"] for row in done), 4) if done else None for way in right
        },
        "prompt_tokens": _mean([row["dense"]["prompt_tokens"] for row in done]),
        "density": _mean(densities),
        "not_sparse": len(done) - len(densities),
        "fallbacks": dict(fallbacks),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(mean(values), 5) if values else None


def _settings(options: argparse.Namespace, preset: Preset, digest: str) -> Row:
    """What rows of one file have in common."""
    found = hardware(options.device)
    return {
        "model": options.model,
        "questions_sha256": digest,
        "preset": preset.model_dump(mode="json"),
        "num_frames": options.num_frames,
        "min_tokens": options.min_tokens,
        "dense_last": options.dense_last,
        "vision": options.vision,
        "device": str(found.get("gpu", found["device"])),
    }


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a vision-language model")
    parser.add_argument("--benchmark", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="ends in .json")
    parser.add_argument("--preset", default="psa-auto")
    parser.add_argument("--density", type=float, help="the preset at this density")
    parser.add_argument("--num-frames", type=int, default=64, help="of each video, evenly spaced")
    parser.add_argument("--min-tokens", type=int, default=8192, help="shorter prompts stay dense")
    parser.add_argument("--dense-last", type=int, default=512, help="tokens at the end that attend everything")
    parser.add_argument("--vision", action="store_true", help="long vision towers sparse, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args(arguments)
    if options.output.suffix != ".json":
        parser.error(f"--output {options.output}: expected a name that ends in .json")
    for name, least in (("num_frames", 1), ("min_tokens", 0), ("dense_last", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    return options


if __name__ == "__main__":
    main()
