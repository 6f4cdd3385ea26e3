"""What psa-calibrate decides on figures that are made up, such as times: what is aimed at, kept and said to be met."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from psa_diffusers import Preset, load_preset
from psa_diffusers.calibrate import runner, verify
from psa_diffusers.calibrate.calibration import measured_steps
from psa_diffusers.calibrate.plan import Calibration, Video
from psa_diffusers.calibrate.scaling import known_density
from psa_diffusers.calibrate.shapes import BASE
from psa_diffusers.calibrate.targets import Target
from psa_diffusers.patch.stats import RunStats
from psa_diffusers.runs.pipeline_call import Generated

pytestmark = pytest.mark.usefixtures("one_thread")


def test_densities_are_corrected_by_what_whole_videos_have(calibrate, monkeypatch):
    """Made up: videos have 0.8 of the density that single calls promise, PSNR is the same for all."""

    def sparse(self, videos, presets, what):
        density = 0.8 * known_density(presets[0].layer_specs(4)[1], 12)
        densities[what] = density
        return [{"psnr": 30.0, "density": density, "step": 1.0} for _ in videos]

    densities = {}
    monkeypatch.setattr(runner.Runs, "sparse", sparse)
    code, summary, _ = calibrate("--density", "0.4", "--frames", "17")
    assert code == 0 and summary["shape"] == BASE
    assert densities[f"trying {BASE}"] == pytest.approx(0.8 * 0.4, abs=0.01)
    assert densities[f"trying {BASE} again"] == pytest.approx(0.4, abs=0.01)
    assert densities["verifying"] == densities["verifying, the base preset"] == pytest.approx(0.4, abs=0.01)
    assert summary["expected"]["density"] == pytest.approx(0.4, abs=0.01)


def test_a_speedup_is_aimed_at_with_times_of_this_machine(calibrate, monkeypatch):
    whole, densities = runner.generate_videos, []

    def timed(pipe, plan, prompts, what, seeds):
        """A sparse step takes 0.1 s and 0.9 s times its density, a dense one 1 s, for each video."""
        results = whole(pipe, plan, prompts, what, seeds)
        sparse = 1.0
        if what.startswith(("timing density", "verifying")):
            rows = next(iter(pipe.transformer.attn_processors.values())).stats().density[2:]
            density = np.mean([row[1:] for row in rows])  # the first layer is dense in any case
            densities.append(density)
            sparse = 0.1 + 0.9 * density
        for result in results:
            per_step = [len(prompts) * seconds for seconds in (1.0, 1.0, sparse, sparse)]
            result.seconds |= {"per_step": per_step, "median_step": float(len(prompts))}
        return results

    monkeypatch.setattr(runner, "generate_videos", timed)
    code, summary, said = calibrate("--speedup", "1.5")
    assert code == 0 and "on this machine a dense step takes 1 s" in said
    # Two dense steps and two of 1/3 s take 2/3 of four dense ones.
    assert densities[2] == pytest.approx((1 / 3 - 0.1) / 0.9, abs=0.05)
    assert summary["verified"]["calibrated"]["speedup"] == pytest.approx(1.5, abs=0.08)
    assert summary["met"] == (summary["verified"]["calibrated"]["speedup"] >= 1.5)


def test_a_speedup_where_all_blocks_are_kept_is_refused(calibrate, monkeypatch):
    """Made up: nothing is left out at any density, as in a video of very few blocks."""
    everything = {"psnr": None, "density": 1.0, "step": None}
    monkeypatch.setattr(runner.Runs, "sparse", lambda self, videos, presets, what: [everything for _ in videos])
    code, _, said = calibrate("--speedup", "1.2")
    assert code == 2 and "the work does not set the time here" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("psnrs", "kept"),
    [
        ({"trying raster": 3.0, "trying layer by layer": 3.02}, "raster"),
        ({"trying raster": 3.0, "trying layer by layer": 5.0}, "layer by layer"),
        ({"trying raster": 0.05, "trying tiles": 0.02}, BASE),
    ],
)
def test_what_is_better_by_more_than_chance_is_kept(calibrate, monkeypatch, psnrs, kept):
    """The videos are the pipeline's, their PSNR is made up: 30 dB and the gain, which varies by a tenth."""
    monkeypatch.setattr(
        runner.Runs,
        "sparse",
        lambda self, videos, presets, what: [
            {"psnr": 30 + psnrs.get(what, -1.0) * (what != f"trying {BASE}") + (-1) ** index * 0.1 * len(what) / 20,
             "density": 0.4, "step": 1.0}
            for index, _ in enumerate(videos)
        ],
    )  # fmt: skip
    layered = lambda layers, density: {layer: ["tiles", "raster"][layer % 2] for layer in layers}  # noqa: E731
    monkeypatch.setattr("psa_diffusers.calibrate.trials.layer_by_layer", layered)
    code, summary, said = calibrate("--density", "0.4")
    assert code == 0 and summary["shape"] == kept and f"kept: {kept}" in said
    assert ("the base preset's shape is kept, so there is no gain" in said) == (kept == BASE)
    assert ("than the base preset at equal density" in said) == (kept != BASE)
    orders = [order.order for order in load_preset(Path("mine.yaml")).layer_orders(4)][1:]
    expected = {"raster": ["raster"] * 3, BASE: ["hilbert"] * 3, "layer by layer": ["raster", "tiles", "raster"]}
    assert orders == expected[kept]


def test_the_verdict_says_whether_it_can_tell():
    assert "0.50 dB better" in verify._verdict(0.5, 0.2) and "+0.30 to +0.70 dB" in verify._verdict(0.5, 0.2)
    assert "hold out more prompts" in verify._verdict(-0.1, 0.2) and "0.10 dB worse" in verify._verdict(-0.1, 0.2)
    assert "hold out 4 or more" in verify._verdict(0.5, None)


@pytest.mark.parametrize(
    ("density", "met"), [(0.2, True), (0.209, True), (0.191, True), (0.211, False), (0.189, False), (0.29, False)]
)
def test_a_density_is_met_to_a_hundredth(density, met):
    """Of the whole, not of the target."""
    plan = SimpleNamespace(target=Target("density", 0.2))
    assert verify.is_met(plan, {"calibrated": {"density": density}}) == met


def test_steps_at_the_end_that_stay_dense_are_not_measured():
    """Of 8 steps with one dense one at the beginning and three at the end, four are sparse."""
    base = Preset(dense_steps=1, dense_last=3)
    plan = SimpleNamespace(
        preset=base, steps=8, model=SimpleNamespace(num_layers=1, experts=1), prompts=(),
    )  # fmt: skip
    calibration = Calibration(plan, (), Target("density", 0.2), 1, Path("mine.yaml"), overwrite=False)
    assert (calibration.sparse_steps, calibration.dense_steps) == ((1, 2, 3, 4), 4)
    assert measured_steps(1, 5, 1) == [3] and measured_steps(1, 5, 9) == [1, 2, 3, 4]
    assert verify._speedup(calibration, 2.0, 1.0) == pytest.approx(16 / 12)
    density = [[1.0], [0.2], [0.2], [0.4], [0.4], [1.0], [1.0], [1.0]]
    stats = RunStats(steps=8, dense_steps=1, dense_last=3, layers=["blocks.0"], density=density)
    runs = runner.Runs(calibration, None, print)
    assert runs._density(stats) == pytest.approx(0.3)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_the_step_of_a_trial_is_one_that_was_not_dense(monkeypatch, density):
    """At density 1 too, where the operator keeps every key. It is the mean step, without what the first compiled."""
    rows = [[1.0], *[[density]] * 6]
    stats = RunStats(steps=7, dense_steps=1, dense_at=[0], layers=["blocks.0"], density=rows)
    made = Generated(np.zeros((1, 16, 16, 3), np.float32), {"per_step": [9.0, 40.0, 2.0, 2.0, 2.0, 5.0, 2.0]}, [])
    psa = SimpleNamespace(stats=lambda: stats)
    monkeypatch.setattr("psa_diffusers.patch.apply.apply_psa", lambda *_, **__: contextlib.nullcontext(psa))
    monkeypatch.setattr(runner.Runs, "_pipeline", lambda self: None)
    monkeypatch.setattr(runner.Runs, "_references", lambda self, batch: [np.zeros((1, 16, 16, 3), np.uint8)])
    monkeypatch.setattr(runner, "generate_videos", lambda *_: [made])
    base = Preset(dense_steps=1)
    settings, model = SimpleNamespace(device="cpu"), SimpleNamespace(num_layers=1, experts=1)
    calibration = SimpleNamespace(plan=SimpleNamespace(preset=base, model=model, settings=settings), base=base, batch=1)
    runs = runner.Runs(calibration, SimpleNamespace(once=lambda name, run: run()), lambda line: None)
    (figures,) = runs.sparse([Video("a cat", 0)], (base, None), "trying")
    assert figures == {"psnr": None, "density": pytest.approx(density), "step": 2.5}
