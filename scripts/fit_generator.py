"""Fit the error model of the rule `budget` to measured errors of blocks, and judge it on a model it was not fitted on.

    python scripts/fit_generator.py --packages FOLDER      # writes docs/quality/learned.json

The judges and their packages are those of `scripts/real_attention.py`. Of every pair of blocks of their samples two
things are known: the terms of the error model (`psa_kernels/allocation/prices.py`), and by how much the dense output
changes if this pair alone is pooled or skipped. Three error models choose levels, by one price a row, as the rule does:

tuned      the constants as they are
constants  exponent of mass, c, and factors on the other two terms: those of a grid with the least error
net        the fitted constants, times what a net of two layers makes of the logarithms of mass, noise, spread and
           distance for each level: trained by Adam through softened choices, at prices that are found anew each step

For each judge the last two are fitted on the other judges' samples, on the sum of the measured errors of single pairs,
which no attention has to be computed for, and then judged by the error of the attention itself. Some minutes.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from attention_judges import demo_model, dinov2, whisper
from attention_judges.judges import Judge
from attention_judges.measure import Measuring
from attention_judges.pairs import Pairs, modelled_errors, pairs_of, prices_of, truth_of
from attention_judges.settings import FEWER_DENSITIES, PYRAMID, Setting
from results import document, write

from psa_diffusers.errors import InputError
from psa_kernels import AttentionSpec
from psa_kernels.allocation.budget import allocate_budget, budget_levels
from psa_kernels.allocation.prices import COVARIANCE, EXPONENT

JUDGES = (dinov2.JUDGE, whisper.JUDGE, demo_model.JUDGE)
OUTPUT = Path("docs/quality/learned.json")
WHAT = "relative error of attention at equal density, levels chosen by error models fitted on the other judges"
GRID = tuple(product((1.4, 1.7, 2.0, 2.3), (2.0, 4.0, 8.0, 16.0), (0.06, 0.25), (0.7, 1.0)))
TUNED = (EXPONENT, COVARIANCE, 0.25, 1.0)
HIDDEN, STEPS, RATE, TEMPERATURE = 24, 80, 0.02, 0.3

ErrorModel = Callable[[Pairs, AttentionSpec], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Known:
    """One sample: its pairs, their importance, measured errors in parts of their head's power, and the setting."""

    judge: str
    spec: AttentionSpec
    pairs: Pairs
    importance: torch.Tensor
    errors: torch.Tensor
    measuring: Measuring
    order: str


class Net(torch.nn.Module):
    """Factors on the errors of every choice but the finest level, from logarithms of the terms."""

    def __init__(self, levels: int, constants: tuple[float, ...]) -> None:
        super().__init__()
        self.constants = constants
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2 * levels - 1, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, levels)
        )
        torch.nn.init.zeros_(self.layers[2].weight)
        torch.nn.init.zeros_(self.layers[2].bias)

    def forward(self, pairs: Pairs, spec: AttentionSpec) -> torch.Tensor:
        spread = pairs.spread.expand_as(pairs.noise)
        # Shares are told in parts of an even one; spread and distance in parts of each other, which no scale changes.
        terms = [
            pairs.mass[None] * pairs.mass.shape[-1],
            pairs.distance[None] / spread[-1:],
            pairs.noise,
            spread / spread[-1:],
        ]
        logs = torch.cat(terms)[:-1].clamp_min(1e-12).log().clamp(-12, 12) / 4
        factors = self.layers(logs.movedim(0, -1)).movedim(-1, 0).clamp(-5, 5).exp()
        errors = modelled_errors(pairs, spec, *self.constants)
        return torch.cat([errors[:1], errors[1:] * factors])


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    try:
        known = [each for judge in JUDGES for each in known_of(judge, options.packages)]
    except InputError as error:
        sys.exit(f"error: {error}")
    rows = []
    for judge in dict.fromkeys(each.judge for each in known):
        others = [each for each in known if each.judge != judge]
        constants = fitted_constants(others)
        net = fitted_net(others, constants)
        models: dict[str, ErrorModel] = {
            "tuned": lambda pairs, spec: modelled_errors(pairs, spec, *TUNED),
            "constants": lambda pairs, spec, found=constants: modelled_errors(pairs, spec, *found),
            "net": net,
        }
        for (name, model), density in product(models.items(), FEWER_DENSITIES):
            with torch.no_grad():
                errors = [attention_error(each, model, density) for each in known if each.judge == judge]
                single = objective([each for each in known if each.judge == judge], model, (density,))
            row: dict[str, Any] = {"judge": judge, "model": name, "target": density}
            row |= {"error": round(sum(errors) / len(errors), 5), "errors": [round(each, 5) for each in errors]}
            row |= {"of_single_pairs": round(single, 5), "constants": list(TUNED if name == "tuned" else constants)}
            rows.append(row)
            print(f"{judge:10} {name:10} {density:.2f} {row['error']:.4f} {row['constants']}", flush=True)
    weights = sum(each.numel() for each in net.parameters())
    write(document(WHAT, rows, commit=options.commit, weights=weights, steps=STEPS), options.output)


def known_of(judge: Judge, packages: Sequence[Path]) -> list[Known]:
    found = []
    for sample in judge.samples(packages, set(judge.names)):
        with torch.no_grad():
            measuring = Measuring(judge, sample)
            setting = Setting("budget", PYRAMID, judge.orders[0], judge.block_query, judge.block_key)
            importance, spec = measuring.importance(setting), setting.spec()
            pairs = pairs_of(measuring, spec, setting.order, importance)
            power = measuring.power(setting.order, spec.block_query) * sample.v.shape[-1]
            errors = truth_of(measuring, spec, setting.order).errors / power[:, None, None]
        rows = importance[:, :, :: measuring.every]
        found.append(Known(judge.name, spec, pairs, rows, errors, measuring, setting.order))
    return found


def objective(known: Sequence[Known], model: ErrorModel, densities: Sequence[float] = FEWER_DENSITIES) -> float:
    """Mean over samples and densities of the root of the sum of the chosen pairs' measured errors, a mean over rows."""
    found = []
    for each, density in product(known, densities):
        spec = replace(each.spec, density=density)
        level = budget_levels(prices_of(model(each.pairs, spec), spec), each.importance, spec)
        found.append(each.errors.gather(0, level)[0].sum(-1).mean().sqrt().item())
    return sum(found) / len(found)


def attention_error(each: Known, model: ErrorModel, density: float) -> float:
    """Relative error of the attention itself."""
    spec = replace(each.spec, density=density)
    lists = allocate_budget(prices_of(model(each.pairs, spec), spec), each.importance, spec)
    return each.measuring.error_of_rows(spec, lists, each.order)[1]


@torch.no_grad()
def fitted_constants(known: Sequence[Known]) -> tuple[float, ...]:
    """Those of the grid with the least error; every judge counts alike, in parts of the error as tuned."""
    judges = {each.judge: [other for other in known if other.judge == each.judge] for each in known}

    def loss(constants: tuple[float, ...]) -> float:
        def model(pairs: Pairs, spec: AttentionSpec) -> torch.Tensor:
            return modelled_errors(pairs, spec, *constants)

        return sum(math.log(objective(each, model)) for each in judges.values())

    return min(GRID, key=loss)


def fitted_net(known: Sequence[Known], constants: tuple[float, ...]) -> Net:
    torch.manual_seed(0)
    net = Net(len(known[0].spec.levels), constants)
    optimizer = torch.optim.Adam(net.parameters(), RATE)
    counts = {each.judge: sum(other.judge == each.judge for other in known) for each in known}
    for step in range(STEPS):
        optimizer.zero_grad()
        density = FEWER_DENSITIES[step % len(FEWER_DENSITIES)]
        sum(softened_error(each, net, density) / counts[each.judge] for each in known).backward()
        optimizer.step()
    return net.eval()


def softened_error(each: Known, model: ErrorModel, density: float) -> torch.Tensor:
    """Logarithm of the expected error and cost if levels are drawn by what they seem to cost at each row's price."""
    spec = replace(each.spec, density=density)
    modelled = model(each.pairs, spec)
    cost = torch.tensor([*(1 / factor for factor in spec.levels), 0.0])[:, None, None, None]
    with torch.no_grad():
        level = budget_levels(prices_of(modelled, spec), each.importance, spec)
        price = left_out(modelled, level, cost)
        true_price = left_out(each.errors, level, cost)
    chance = (-(modelled / price + cost) / TEMPERATURE).softmax(0)
    spent = (chance * (each.errors + true_price * cost)).sum(0)
    return spent.sum(-1).mean().log()


def left_out(errors: torch.Tensor, level: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """About the price of a row, `[H, rows, 1]`: an eighth of its pairs would spare more by one finer level."""
    finer = (level - 1).clamp_min(0)
    flat = cost.flatten()
    slope = (errors.gather(0, level) - errors.gather(0, finer))[0] / (flat[finer] - flat[level])[0].clamp_min(1e-9)
    slope = torch.where(level[0] > 0, slope, 0.0)
    return slope.topk(max(1, slope.shape[-1] // 8), -1).values[..., -1:].clamp_min(1e-12)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", type=Path, default=[], metavar="FOLDER", help="of unpacked packages")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    parser.add_argument("--commit", help="default: git's HEAD")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
