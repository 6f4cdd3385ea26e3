"""The experiments of the paper, on the bundled demo model or any other: dense and sparse from the same seeds.

    python scripts/quality.py density                                    # writes docs/quality/density.json and .png
    python scripts/quality.py all --device cuda --settings 1/3           # a third of all settings; run 2/3 and 3/3 too
    python scripts/quality.py all --plots-only                           # draws what the JSON files hold

Experiments: density, levels, thresholds, estimators, similarity, order, dense-steps, rules, auto, corrected, held-out,
uncorrected, sol. Each finished setting is saved at once and not measured again, so a run can be stopped and goes on;
several processes may work on one experiment. What a machine lacks the package for is left out, with a line that says
so. PSNR and SSIM are those of the sparse video against the dense one, means over frames; intervals are 95 % over
prompts, `delta_psnr` is the mean difference to the setting `against`, prompt by prompt. `seconds` can be compared only
between settings that had the device to themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality_lab.experiments import EXPERIMENTS
from quality_lab.lab import Conditions, Lab
from quality_lab.plot import plot
from quality_lab.settings import Setting
from quality_lab.store import Store, read

from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import Model, resolve_model
from psa_diffusers.errors import InputError

Row = dict[str, Any]
FOLDER = Path("docs/quality")
SEED = 20260


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    names = list(EXPERIMENTS) if "all" in options.experiments else list(dict.fromkeys(options.experiments))
    try:
        paths = _paths(names, options.output)
        if not options.plots_only:
            _measure(paths, options)
        for name, path in paths.items():
            if options.plots_only or path.exists():
                _draw(name, path)
    except InputError as error:
        sys.exit(f"error: {error}")


def _measure(paths: dict[str, Path], options: argparse.Namespace) -> None:
    model = resolve_model(options.model)
    if model.takes_image:
        raise InputError(f"--model {options.model}: makes videos from images; the experiments have only text")
    conditions = _conditions(model, options)
    dtype = "float32" if options.device == "cpu" else model.card.dtype
    shared = {"model": options.model, **asdict(conditions), "dtype": dtype}
    stores, work = {}, []
    for name, path in paths.items():
        settings = list(EXPERIMENTS[name].settings())
        what = f"{EXPERIMENTS[name].about}; PSNR and SSIM against dense videos of the same seeds"
        order = [setting.name for setting in settings]
        stores[name] = Store(path, what, shared, order, device=options.device, commit=options.commit)
        work += [(name, setting) for setting in settings]
    work = work[options.settings[0] - 1 :: options.settings[1]]
    finished = {(name, row["setting"]) for name, store in stores.items() for row in store.rows()}
    missing = [(name, setting) for name, setting in work if (name, setting.name) not in finished]
    todo = [(name, setting) for name, setting in missing if _can_be_measured(setting, options.device)]
    print(f"{len(todo)} settings to measure, {len(work) - len(missing)} are there", flush=True)
    if not todo:
        return
    pipe = load_pipeline(
        model,
        dtype=dtype,
        device=options.device,
        offload=options.offload,
        flow_shift=model.card.flow_shift,
    )
    lab = Lab(pipe, model.card, conditions)
    for name, row, dense in _rows(lab, todo, alone=options.alone):
        print(_line(name, stores[name].add(row, dense)), flush=True)
    print(json.dumps({name: str(store.path) for name, store in stores.items()}))


def _can_be_measured(setting: Setting, device: str) -> bool:
    """Prints why not."""
    obstacle = None if setting.compute is None else setting.compute.obstacle(device)
    if obstacle is not None:
        print(f"{setting.name} is left out: {obstacle}", flush=True)
    return obstacle is None


def _rows(lab: Lab, todo: list[tuple[str, Setting]], *, alone: bool) -> Iterator[tuple[str, Row, Row]]:
    """The experiment, the setting's row, and what is known of the dense videos it was compared with."""
    for name, setting in todo:
        figures = lab.measure(setting)
        row = {
            "setting": setting.name,
            "series": setting.series,
            "against": setting.against,
            "content": setting.content,
            **{key: value for key, value in figures.items() if key != "psnr"},
            "psnr_each": figures["psnr"],
            "alone": alone,
            **_computed(setting),
        }
        yield name, row, {setting.content or "all": lab.dense(setting.content).about}


def _computed(setting: Setting) -> Row:
    """What computed the sparse calls."""
    if setting.compute is not None:
        return {"computed_by": setting.compute.about, "dense_steps": setting.preset.dense_steps}
    return {"preset": setting.preset.model_dump(mode="json", exclude={"name", "source"})}


def _draw(name: str, path: Path) -> None:
    picture = path.with_suffix(".png")
    result = read(path)
    title = f"{name}: {EXPERIMENTS[name].about}\n{result.get('model')}, {result.get('prompts')} prompts"
    if plot(result["rows"], title, picture, axis=EXPERIMENTS[name].axis):
        print(f"drew {picture}", flush=True)
    else:
        print(f"{picture} is not drawn: matplotlib is not installed, or there are no rows", flush=True)


def _line(name: str, row: Row) -> str:
    def with_interval(value: float, half: float | None, sign: str = "") -> str:
        return f"{value:{sign}.2f}" + ("" if half is None else f" ± {half:.2f}")

    parts = [f"{name:12}{row['setting']:30} density {row['density']:.4f}"]
    parts.append(f"PSNR {with_interval(row['psnr'], row['psnr_ci'])}")
    parts.append("SSIM -" if row["ssim"] is None else f"SSIM {row['ssim']:.4f}")
    parts.append(f"flicker {row['flicker']:.2f}")
    parts.append(f"{row['seconds']:.2f} s a video")
    if row["delta_psnr"] is not None and row["against"] != row["setting"]:
        parts.append(f"{with_interval(row['delta_psnr'], row['delta_ci'], '+')} dB to {row['against']}")
    return "  ".join(parts)


def _conditions(model: Model, options: argparse.Namespace) -> Conditions:
    card = model.card
    frames, height, width = options.frames or card.frames, options.height or card.height, options.width or card.width
    if height % model.size_step or width % model.size_step:
        raise InputError(f"--height {height} --width {width}: expected multiples of {model.size_step}")
    if frames % model.frame_step != 1 % model.frame_step:
        raise InputError(f"--frames {frames}: expected one more than a multiple of {model.frame_step}")
    return Conditions(
        prompts=options.prompts,
        steps=options.steps or card.steps,
        batch=options.batch,
        seed=options.seed,
        height=height,
        width=width,
        frames=frames,
        ssim_prompts=min(options.prompts, options.ssim_prompts),
    )


def _paths(names: list[str], output: Path) -> dict[str, Path]:
    if output.suffix != ".json":
        return {name: output / f"{name}.json" for name in names}
    if len(names) > 1:
        raise InputError(f"--output {output}: is one file, and there are {len(names)} experiments; give a folder")
    return {names[0]: output}


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with i from 1 to n")
    return int(number), int(parts)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive integer")
    return int(text)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT")
    parser.add_argument("--model", default="demo", help="as psa-generate takes it")
    parser.add_argument("--prompts", type=_positive, default=32)
    parser.add_argument("--steps", type=_positive, help="default: the model's own, 16 for the demo")
    parser.add_argument("--batch", type=_positive, default=16, help="videos made at once")
    parser.add_argument("--seed", type=int, default=SEED, help="of the prompts and of the first video")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; float32 on the CPU, else the model's own dtype")
    parser.add_argument("--offload", default="none", choices=["none", "model", "group"])
    parser.add_argument("--height", type=_positive)
    parser.add_argument("--width", type=_positive)
    parser.add_argument("--frames", type=_positive)
    parser.add_argument("--ssim-prompts", type=int, default=8, help="SSIM is that of so many prompts, for it is slow")
    parser.add_argument("--settings", type=_part, default=(1, 1), metavar="i/n", help="the i-th of n interleaved parts")
    parser.add_argument("--alone", action="store_true", help="note that nothing else runs on the device")
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"folder, or a .json file (default {FOLDER})")
    parser.add_argument("--commit", help="default: git's HEAD")
    parser.add_argument("--plots-only", action="store_true", help="only draw what the JSON files hold")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
