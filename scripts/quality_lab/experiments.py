"""The experiments: which settings each compares. Blocks have 128 queries and 64 keys unless said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from demo.captions import BACKGROUNDS
from operator_bench.sol_int8 import RULES
from quality_lab.settings import SAMPLED, Setting, at_density, published, vary, vary_if_known
from quality_lab.sol import SolAttention, as_preset

from psa_diffusers import Preset, load_preset
from psa_presets.density import scaled_thresholds

DENSITIES = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
COUNT_SCALES = (0.4, 0.6, 0.8, 1.0, 1.4)
MASS_SCALES = (0.5, 0.7, 0.85, 1.0, 1.1)
MASS_THRESHOLDS = (0.7, 0.8, 0.9)
FLOOR = 0.12
STRIDES = (4, 8, 16)
SIMILARITY = [0.7, 0.65]
SMALL = {"query": 128, "key": 32}
RASTER: dict[str, dict[str, Any]] = {
    "raster": {"order": "raster"},
    "raster, 32 keys": {"order": "raster", "block": SMALL},
}
FINE = {**SAMPLED, "query_stride": 4, "key_stride": 4}
SAMPLED_MEAN = {**SAMPLED, "statistic": "mean"}
POOLED_MEAN = {**SAMPLED_MEAN, "estimator": "pooled"}
# What psa-auto was changed from, one thing after the other.
FORMER: dict[str, Any] = {"error_model": "tuned", "refresh": 1, "correction": False}


@dataclass(frozen=True)
class Experiment:
    """What is asked, its settings, and the density that the plot shows PSNR against; None for a line a setting."""

    about: str
    settings: Callable[[], Iterator[Setting]]
    axis: str | None = None


def density() -> Iterator[Setting]:
    for share in DENSITIES:
        binary = f"binary {share}"
        yield Setting(binary, vary("psa-3", levels=[1], thresholds=[share]), binary, "binary")
        yield Setting(f"psa-3 {share}", vary("psa-3", thresholds=at_density(share)), binary, "psa-3, scaled")


def levels() -> Iterator[Setting]:
    first = "binary mass 0.85"
    for mass in (0.85, 0.75, 0.8, 0.9):
        yield Setting(f"binary mass {mass}", vary("psa-3", rule="mass", levels=[1], thresholds=[mass]), first, "mass")
    pyramid = vary("psa-3", rule="mass", levels=[1, 2, 4, 8], thresholds=[0.7, 0.8, 0.9, 0.9])
    yield Setting("levels mass .7 .8 .9 .9", pyramid, first, "mass")
    for number in range(1, 6):
        yield Setting(f"psa-{number}", published(f"psa-{number}"), "psa-1", "count, published")


def thresholds() -> Iterator[Setting]:
    first = "count x 1.0"
    for scale in sorted(COUNT_SCALES, key=lambda scale: scale != 1):
        yield Setting(f"count x {scale}", vary("psa-3", thresholds=_count(scale)), first, "count")
    for scale in COUNT_SCALES:
        if _count(scale)[0] < FLOOR:  # a lower floor changes nothing
            preset = vary("psa-3", thresholds=_count(scale), floor=FLOOR)
            yield Setting(f"count x {scale}, floor {FLOOR}", preset, first, f"count, floor {FLOOR}")
    for floor, scale in product((0.0, FLOOR), MASS_SCALES):
        series = f"mass, floor {floor}" if floor else "mass"
        preset = vary("psa-3", rule="mass", thresholds=scaled_thresholds(MASS_THRESHOLDS, scale), floor=floor)
        yield Setting(series.replace("mass", f"mass x {scale}"), preset, first, series)


def estimators() -> Iterator[Setting]:
    for estimator, statistic, stride in product(("sampled", "pooled"), ("max", "mean"), STRIDES):
        importance = {"estimator": estimator, "statistic": statistic, "query_stride": stride, "key_stride": stride}
        preset = vary("psa-3", importance=importance)
        yield Setting(
            f"{estimator} {statistic} {stride}/{stride}", preset, "sampled max 4/4", f"{estimator} {statistic}"
        )


def similarity() -> Iterator[Setting]:
    """The cap raises the density, so both are measured at two scales: curves can be compared where densities meet."""
    for content in BACKGROUNDS:
        first = f"{content}, no cap x 1.0"
        for cap, scale in ((None, 1.0), (SIMILARITY, 1.0), (None, 1.5), (SIMILARITY, 0.7)):
            word = "cap" if cap else "no cap"
            preset = vary("psa-3", thresholds=_count(scale), similarity=cap)
            yield Setting(f"{content}, {word} x {scale}", preset, first, f"{content}, {word}", content)


def order() -> Iterator[Setting]:
    for base, way in product(("psa-3", "psa-5"), ("hilbert", "tiles", "raster")):
        yield Setting(f"{base} {way}", vary(base, order=way), f"{base} hilbert", base)


def dense_steps() -> Iterator[Setting]:
    for share in (0.0, 0.1, 0.25, 0.4, 0.5):
        yield Setting(f"dense {share:.0%}", vary("psa-3", dense_steps=share), "dense 0%", "psa-3")


def rules() -> Iterator[Setting]:
    ways = {
        "count": {},
        "budget": {"rule": "budget"},
        "psa-auto": {"rule": "budget", "share_guidance": True},
        "psa-auto, refresh 4": {"rule": "budget", "share_guidance": True, "refresh": 4},
        "budget, levels to 8": {"rule": "budget", "levels": [1, 2, 4, 8]},
        "count, rest mean": {"rest": "mean"},
        "budget, rest mean": {"rule": "budget", "rest": "mean"},
        "count, shared guidance": {"share_guidance": True},
        "count, refresh 4": {"refresh": 4},
        **{f"count, {name}": changes for name, changes in RASTER.items()},
    }
    for share, (way, changes) in product((0.15, 0.25), ways.items()):
        name = f"{way} {share}"
        spending = {"density": share} if "rule" in changes else {}
        preset = vary_if_known(name, "psa-3", thresholds=at_density(share), **changes, **spending)
        if preset is not None:
            yield Setting(name, preset, f"count {share}", way)
    # Their densities depend on the videos and come near these two.
    for share, floor in ((0.25, 0.15), (0.25, 0.12), (0.15, 0.04), (0.15, 0.06)):
        yield Setting(f"mass, floor {floor}", _mass(share, floor), f"count {share}", "mass")
    for (share, floor), (name, changes) in product(((0.25, 0.15), (0.15, 0.1)), RASTER.items()):
        preset = _mass(share, floor, **changes)
        yield Setting(f"mass, floor {floor}, {name}", preset, f"count {share}", f"mass, {name}")


def auto() -> Iterator[Setting]:
    """What `psa-auto` could be: rule budget with shared guidance, and one thing changed at a time."""
    ways: dict[str, dict[str, Any]] = {
        "hilbert": {},
        "raster": {"order": "raster"},
        "tiles": {"order": "tiles", "tile": [1, 8, 8]},
        "hilbert, 32 keys": {"block": SMALL},
        "raster, 32 keys": RASTER["raster, 32 keys"],
        "hilbert, levels to 8": {"levels": [1, 2, 4, 8]},
        "raster, levels to 8": {"levels": [1, 2, 4, 8], "order": "raster"},
        "raster, 32 keys, levels to 8": {"levels": [1, 2, 4, 8], **RASTER["raster, 32 keys"]},
        "hilbert, strides 4": {"importance": FINE},
        "hilbert, refresh 4": {"refresh": 4},
        "hilbert, not shared": {"share_guidance": False},
        "hilbert, sampled mean": {"importance": SAMPLED_MEAN},
        "hilbert, pooled mean": {"importance": POOLED_MEAN},
        "hilbert, 32 keys, pooled mean": {"block": SMALL, "importance": POOLED_MEAN},
        "raster, 32 keys, pooled mean": RASTER["raster, 32 keys"] | {"importance": POOLED_MEAN},
        "hilbert, corrected": {"correction": True},
        "raster, 32 keys, corrected": RASTER["raster, 32 keys"] | {"correction": True},
        "hilbert, pooled mean, corrected": {"importance": POOLED_MEAN, "correction": True},
    }
    falls = {"falling": (1.5, 1.0, 0.5), "falling steeply": (2.0, 0.7, 0.3), "rising": (0.5, 1.0, 1.5)}
    for share in (0.15, 0.25):
        first = f"psa-3 {share}"
        yield Setting(first, vary("psa-3", thresholds=at_density(share)), first, "psa-3")
        shared = vary("psa-3", thresholds=at_density(share), share_guidance=True)
        yield Setting(f"psa-3, shared {share}", shared, first, "psa-3, shared")
        corrected = vary("psa-3", thresholds=at_density(share), share_guidance=True, correction=True)
        yield Setting(f"psa-3, shared, corrected {share}", corrected, first, "psa-3, shared, corrected")
        for way, changes in ways.items():
            yield Setting(f"{way} {share}", vary("psa-auto", density=share, **{**FORMER, **changes}), first, way)
        for (way, parts), order in product(falls.items(), ("hilbert", "raster")):
            preset = vary("psa-auto", density=share, order=order, steps=_over_steps(share, parts), **FORMER)
            yield Setting(f"{order}, {way} {share}", preset, first, f"{order}, {way}")
        edges = vary("psa-auto", density=share * 0.8, layers=[{"match": "0,7", "density": share * 1.6}], **FORMER)
        yield Setting(f"hilbert, denser ends {share}", edges, first, "hilbert, denser ends")


def corrected() -> Iterator[Setting]:
    """What goes well with the correction: one thing changed at a time, dense steps among them."""
    ways: dict[str, dict[str, Any]] = {
        "tuned errors, refresh 1": {},
        "fitted errors": {"error_model": "fitted"},
        "mean of the rest": {"rest": "mean"},
        "levels to 8": {"levels": [1, 2, 4, 8]},
        "refresh 4": {"refresh": 4},
        "dense last step": {"dense_last": 1},
        **{f"{steps} of 16 steps dense": {"dense_steps": steps} for steps in (1, 2, 3)},
    }
    for share in (0.15, 0.25, 0.10):
        first = f"psa-3 {share}"
        yield Setting(first, vary("psa-3", thresholds=at_density(share)), first, "psa-3")
        for way, changes in ways.items():
            preset = vary("psa-auto", density=share, **{**FORMER, "correction": True, **changes})
            yield Setting(f"{way} {share}", preset, first, way)


def held_out() -> Iterator[Setting]:
    """`psa-auto` as it is, to be run with prompts of another seed than those among which it was chosen."""
    for share in (0.15, 0.25):
        first, auto = f"psa-3 {share}", vary("psa-auto", density=share)
        yield Setting(first, vary("psa-3", thresholds=at_density(share)), first, "psa-3")
        yield Setting(f"psa-auto {share}", auto, first, "psa-auto")
        yield Setting(f"psa-auto, not corrected {share}", auto.replace(correction=False), first, "not corrected")


def uncorrected() -> Iterator[Setting]:
    """What the error model and kept lists do where the correction has no room; prompts as for `held-out`."""
    for share in (0.25, 0.15):
        first = f"tuned errors, refresh 1 {share}"
        for model, refresh in product(("tuned", "fitted"), (1, 4)):
            way = f"{model} errors, refresh {refresh}"
            preset = vary("psa-auto", density=share, correction=False, error_model=model, refresh=refresh)
            yield Setting(f"{way} {share}", preset, first, way)


def sol() -> Iterator[Setting]:
    """Sol-Attn by its own kernel and by ours, beside PSA; to be run with the prompts of `held-out`."""
    shares = (0.1, 0.15, 0.25)
    plain = {share: f"psa-auto, not corrected {share}" for share in shares}
    for share in shares:
        auto = vary("psa-auto", density=share)
        yield Setting(plain[share], auto.replace(correction=False), plain[share], "psa-auto, not corrected")
        yield Setting(f"psa-auto {share}", auto, plain[share], "psa-auto")
        for name, base in (("psa-3", "psa-3"), ("binary", "psa-1")):
            thresholds = load_preset(base).at_density(share).thresholds
            yield Setting(f"{name} {share}", vary(base, thresholds=thresholds), plain[share], name)
    for share in shares:
        yield Setting(f"sol-rule top-k {share}", as_preset(share), plain[share], "sol-rule top-k")
    for rule in RULES:
        share = rule.value if rule.kind == "top-k" else 0.15  # the nearest density
        series = f"sol-int8 {rule.kind}"
        compute = SolAttention(rule)
        yield Setting(f"{series} {rule.value}", as_preset(share), plain[share], series, compute=compute)


def _over_steps(share: float, parts: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Rules that give each third of the sparse steps of a run its part of the density, whose mean is `share`."""
    places = ("25-50%", "50-75%", "75%-")
    return [{"match": match, "density": share * part} for match, part in zip(places, parts, strict=True)]


def _count(scale: float) -> tuple[float, ...]:
    return scaled_thresholds(load_preset("psa-3").thresholds, scale)


def _mass(share: float, floor: float, **changes: Any) -> Preset:
    thresholds = [0.4, 0.6, 0.9] if share == 0.25 else [0.3, 0.45, 0.7]
    return vary("psa-3", rule="mass", thresholds=thresholds, floor=floor, **changes)


EXPERIMENTS = {
    "density": Experiment(
        "a pyramid against blocks that are kept or skipped, at the same densities", density, "density"
    ),
    "levels": Experiment("four levels against one, by mass; the five published presets, by count", levels),
    "thresholds": Experiment("the count rule against the mass rule, with and without a floor", thresholds, "density"),
    "estimators": Experiment("how the importance of blocks is estimated", estimators),
    "similarity": Experiment("the similarity cap over backgrounds from plain to busy", similarity, "density"),
    "order": Experiment("the order of the tokens", order),
    "dense-steps": Experiment("the share of dense steps", dense_steps, "density_run"),
    "auto": Experiment("what psa-auto could be, at the same densities", auto),
    "corrected": Experiment("what goes well with the correction of psa-auto", corrected, "density"),
    "held-out": Experiment("psa-auto and psa-3, for prompts of a seed of their own", held_out, "density"),
    "uncorrected": Experiment("psa-auto without its correction", uncorrected, "density"),
    "sol": Experiment("Sol-Attn beside psa-auto, psa-3 and binary blocks", sol, "density"),
    "rules": Experiment("psa-3 and what could be better, at the same densities", rules),
}
