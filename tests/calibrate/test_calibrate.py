"""psa-calibrate on tiny random pipelines: it meets a density, continues where it stopped, and refuses bad input."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from typer.main import get_command

from psa_diffusers import Preset, apply_psa, load_preset
from psa_diffusers.calibrate import runner, shapes, verify
from psa_diffusers.calibrate.calibration import measured_steps
from psa_diffusers.calibrate.choose import layer_by_layer, ranked
from psa_diffusers.calibrate.measure import Measurement, curves_of
from psa_diffusers.calibrate.plan import Calibration
from psa_diffusers.calibrate.scaling import SCALES, known_density, scaled_settings
from psa_diffusers.calibrate.shapes import BASE
from psa_diffusers.calibrate.targets import Target
from psa_diffusers.cli import calibrate as cli_calibrate
from psa_diffusers.cli.shell import run_command
from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.stats import RunStats
from psa_diffusers.patch.token_order import token_permutation
from psa_testing.tiny_pipelines import run as run_pipeline
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--height", "96", "--width", "96", "--frames", "9", "--steps", "4", "--guidance", "1"]
FOUR = ["a cat", "a dog", "a cow", "a hen"]
BASE_YAML = (
    "block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.2, 0.35, 0.5]\n"
    "layers: [{match: 0, dense: true}]\ndense_steps: 0.5\n"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_wan(num_layers=4).save_pretrained(folder / "wan")
    experts = tiny_wan(two_stage=True, num_layers=2)
    with torch.no_grad():
        experts.transformer_2.blocks[0].attn1.to_out[0].weight.mul_(20)
    experts.save_pretrained(folder / "experts")
    (folder / "base.yaml").write_text(BASE_YAML)
    auto = load_preset("psa-auto").model_dump(mode="json", exclude_unset=True)
    auto |= {"block": {"query": 32, "key": 16}, "min_tokens": 0, "dense_steps": 0.5}
    (folder / "auto.yaml").write_text(yaml.safe_dump(auto))
    (folder / "rules.yaml").write_text('steps: [{match: "0-50%", floor: 0.2}]\n')
    (folder / "short.yaml").write_text("dense_steps: 2\ndense_last: 2\n")
    (folder / "early.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\ndense_steps: 0.0\n")
    return folder


@pytest.fixture
def calibrate(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "SHAPES", {BASE: {}, "raster": {"order": "raster"}, "tiles": {"order": "tiles"}})
    Path("prompts.txt").write_text("\n".join([*FOUR, "an owl", "a fox"]))

    def go(*arguments: str, model: str = "wan", base: str = "base.yaml"):
        given = ["--model", str(models / model), "--base-preset", str(models / base), "--prompts", "prompts.txt"]
        given += [
            *SMALL,
            "--max-prompts",
            "4",
            "--batch",
            "4",
            "--held-out",
            "1",
            "--measured-steps",
            "1",
            "-o",
            "mine.yaml",
            *arguments,
        ]
        code = run_command("psa-calibrate", cli_calibrate.calibrate_app, given)
        output = capsys.readouterr()
        return code, json.loads(output.out.splitlines()[-1]) if output.out else None, output.err

    return go


def forbid_runs(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("nothing should have to run again")

    monkeypatch.setattr(runner, "generate_videos", fail)
    monkeypatch.setattr(runner, "load_pipeline", fail)


def test_a_density_is_met_and_nothing_is_measured_twice(calibrate, monkeypatch, tmp_path):
    code, summary, said = calibrate("--density", "0.4", "--frames", "17")

    assert code == 0 and summary["met"] and summary["status"] == "complete"
    assert summary["verified"]["prompts"][0]["prompt"] == "a fox"
    for which in ("calibrated", "uniform"):
        assert summary["verified"][which]["density"] == pytest.approx(0.4, abs=0.01)
    assert "3 shapes of attention to compare: as the base preset; raster; tiles" in said
    trials = {row["shape"]: row for row in summary["trials"]}
    assert {BASE, "raster", "tiles"} <= trials.keys() and summary["shape"] in trials
    assert all(row["density"] == pytest.approx(0.4, abs=0.01) for row in trials.values())
    assert trials[BASE]["gain_db"] == 0 and summary["expected"]["density"] == pytest.approx(0.4, abs=0.01)
    assert "verified on 1 held-out prompts, calibrated: PSNR" in said
    psnr = [summary["verified"][name]["psnr"] for name in ("calibrated", "uniform")]
    assert summary["verified"]["gain_db"] == pytest.approx(psnr[0] - psnr[1])
    assert summary["verified"]["gain_interval_db"] is None
    preset = load_preset(Path("mine.yaml"))
    specs = preset.layer_specs(4)
    assert preset.name == "mine" and specs[0] is None and preset.dense_steps == 0.5
    written = Path("mine.yaml").read_text()
    forbid_runs(monkeypatch)
    again, repeated, _ = calibrate("--density", "0.4", "--frames", "17")
    assert again == 0 and repeated == summary
    assert Path("mine.yaml").read_text() == written


def test_an_interrupted_calibration_continues(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []

    def interrupted(*arguments, **named):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(arguments[3])
        return whole(*arguments, **named)

    monkeypatch.setattr(runner, "generate_videos", interrupted)
    assert calibrate("--density", "0.4")[0] == 130
    assert made == ["measuring", "trying as the base preset"]
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append(a[3]) or whole(*a, **k))
    code, summary, _ = calibrate("--density", "0.4")
    assert code == 0 and len(made) == len(set(made))
    assert {f"trying {row['shape']}" for row in summary["trials"]} <= set(made)


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


def test_the_preset_that_it_starts_from_keeps_its_rule_and_its_sharing(calibrate, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", {BASE: {}, "raster": {"order": "raster"}})
    given = {parameter.name: parameter.default for parameter in get_command(cli_calibrate.calibrate_app).params}
    assert given["base_preset"] == "psa-auto"
    code, summary, _ = calibrate("--density", "0.3", "--frames", "17", base="auto.yaml")
    assert code == 0 and summary["met"]
    for which in ("calibrated", "uniform"):
        assert summary["verified"][which]["density"] == pytest.approx(0.3, abs=0.01)
    preset = load_preset(Path("mine.yaml"))
    assert preset.share_guidance
    densities = [spec.density for spec in preset.layer_specs(4) if spec.rule == "budget"]
    assert densities == pytest.approx([0.3] * 4, abs=0.04)  # the budget of a row is rounded down to what blocks cost


def test_a_psnr_is_tried_end_to_end(calibrate):
    code, summary, said = calibrate("--target-psnr", "15")
    assert code == 0 and "tried raster: PSNR" in said
    assert "density 0.250: PSNR" in said or "density 0.25" in said
    assert summary["verified"]["calibrated"]["psnr"] > 10


def test_several_videos_are_made_at_once(calibrate, monkeypatch):
    whole, made = runner.generate_videos, []
    monkeypatch.setattr(runner, "generate_videos", lambda *a, **k: made.append((a[2], a[4])) or whole(*a, **k))
    more = ["--density", "0.4", "--held-out", "2"]
    code, summary, said = calibrate(*more)
    assert code == 0
    # Measured and tried, then dense, calibrated and the base preset (once more where these two differ).
    tried = 1 + len(summary["trials"])
    assert all(each == (FOUR, [0, 1, 2, 3]) for each in made[:tried])
    assert all(each == (["an owl", "a fox"], [4, 5]) for each in made[tried:]) and len(made) - tried in (2, 3)
    assert "verifying: 2 prompts, an owl" in said
    rows = summary["verified"]["prompts"]
    assert [(row["prompt"], row["seed"]) for row in rows] == [("an owl", 4), ("a fox", 5)]
    assert rows[0]["calibrated"]["psnr"] != rows[1]["calibrated"]["psnr"]
    assert rows[0]["dense_step"] == rows[1]["dense_step"] > 0
    code, _, said = calibrate(*more, "--batch", "2")
    assert code == 2 and "holds measurements of other settings (batch differ)" in said


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


def test_each_expert_gets_its_own_preset(calibrate):
    code, summary, said = calibrate("--density", "0.4", "--measured-steps", "9", model="experts", base="early.yaml")
    assert code == 0 and "keeps the base preset" not in said
    assert summary["output"] == ["mine.yaml", "mine-2.yaml"]
    first, second = load_preset(Path("mine.yaml")), load_preset(Path("mine-2.yaml"))
    assert (first.name, second.name) == ("mine", "mine-2")
    assert summary["verified"]["calibrated"]["density"] == pytest.approx(0.4, abs=0.03)


def test_measuring_changes_nothing_and_tells_what_a_sparse_run_would():
    pipe = tiny_wan(num_layers=2)
    base = Preset(block={"query": 32, "key": 16}, min_tokens=0, dense_steps=0.0)
    compared = {"raster": base.replace(order="raster"), "hilbert": base}
    plain = run_pipeline(pipe)
    with Measurement(pipe, compared, {1}) as measurement:
        assert torch.allclose(run_pipeline(pipe), plain, atol=1e-4)
    figures = measurement.figures()
    assert torch.equal(run_pipeline(pipe), plain)
    scaled = Preset(**{**base.model_dump(), **scaled_settings(base.layer_specs(1)[0], SCALES[1])})
    with apply_psa(pipe, scaled) as psa:
        run_pipeline(pipe, guidance_scale=1.0)
        stats = psa.stats()
    assert list(figures) == stats.layers
    for index, rows in enumerate(figures.values()):
        assert rows["hilbert"]["densities"][1] == pytest.approx(stats.density[1][index], abs=1e-6)
        for row in rows.values():
            assert row["errors"][0] > row["errors"][-1] > 0 and row["blocks"] == [3]
    curve = curves_of([figures], compared, stats.layers)[1]["hilbert"]
    assert curve.density_at(SCALES[1]) == pytest.approx(stats.density[1][1], abs=1e-6)


def measured(pipe, shapes, steps, **call):
    with Measurement(pipe, shapes, steps) as measurement:
        run_pipeline(pipe, **call)
    return measurement.figures()


def test_of_two_forwards_a_step_only_the_first_is_measured():
    """At the first step the first forward is the same with and without guidance."""
    pipe = tiny_wan(num_layers=2)
    base = Preset(block={"query": 32, "key": 16}, min_tokens=0, dense_steps=0.0)
    compared = {"hilbert": base, "mass": base.replace(rule="mass", thresholds=[0.2, 0.3, 0.4])}
    alone = measured(pipe, compared, {0}, guidance_scale=1.0)
    assert measured(pipe, compared, {0}, guidance_scale=6.0) == alone
    assert {name: list(rows) for name, rows in alone.items()} == {name: [*compared] for name in alone}
    # Measuring a later step as well makes a difference, so what is equal above is not so by chance.
    assert measured(pipe, compared, {0, 1}, guidance_scale=6.0) != alone


def test_the_order_that_suits_a_layer_is_found(monkeypatch):
    """Tokens attend to those of their run of 16: in raster order in the first layer, on the curve in the second."""
    pipe = tiny_wan(num_layers=2)
    grid, size = (4, 8, 8), 16
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for block, order in zip(pipe.transformer.blocks, ("raster", "hilbert"), strict=True):
        place = torch.empty(256, dtype=torch.long)
        place[token_permutation(order, grid)] = torch.arange(256) // size
        groups[block.attn1] = place

    base = Preset(block={"query": 32, "key": size}, min_tokens=0, dense_steps=0.0, thresholds=[0.1, 0.1, 0.15])
    compared = {name: base.replace(order=name) for name in ("raster", "hilbert", "tiles")}
    project = Wan.project

    def constructed(attn, call):
        q, _, v = project(attn, call)
        codes = torch.nn.functional.normalize(torch.randn(256 // size, q.shape[-1], generator=generator), dim=-1)
        mine = (12 * codes)[groups[attn]][None, :, None].expand_as(q)
        return mine.contiguous(), mine.contiguous(), torch.randn(v.shape, generator=generator)

    monkeypatch.setattr(Wan, "project", staticmethod(constructed))
    with Measurement(pipe, compared, {1}) as measurement:
        run_pipeline(pipe, height=128, width=128, num_frames=13)
    curves = curves_of([measurement.figures()], compared, measurement.processor.stats().layers)
    assert layer_by_layer(curves, 0.12) == {0: "raster", 1: "hilbert"}
    assert ranked(curves, 0.12)[-1] == "tiles"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one target: --target-psnr, --density or --speedup"),
        (["--density", "0.2", "--speedup", "2"], "give one target"),
        (["--density", "2"], "--density 2: must be from 0.01 to 0.95"),
        (["--speedup", "2"], "--speedup 2: must be above 1 and below 2.00"),
        (["--density", "0.2", "--held-out", "6"], "6 different prompts are too few to hold out 6"),
        (["--density", "0.2", "--max-prompts", "3"], "--prompts: 3 different prompts to measure on are too few"),
        (["--density", "0.2", "--held-out", "0"], "--held-out 0: must be 1 or more"),
        (["--density", "0.2", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["--density", "0.2", "--verify", "prompts.txt"], "--verify: the prompt 'a cat' is also measured on"),
        (["--density", "0.2", "--base-preset", "dense"], "--base-preset dense: has no shape to compare"),
        (["--density", "0.2", "--base-preset", "psa-9"], "--base-preset psa-9"),
        (["--density", "0.2", "-o", "mine.txt"], "--output mine.txt: must end in .yaml"),
        (["--density", "0.2", "-o", "dense.yaml"], "--output dense.yaml"),
        (["--density", "0.2", "-o", "taken.yaml"], "--output taken.yaml: is already there"),
        (["--density", "0.2", "--measured-steps", "0"], "--measured-steps 0"),
        (["--density", "0.2", "--batch", "0"], "--batch 0: must be 1 or more"),
        (["--density", "0.2", "--steps", "0"], "--steps 0: must be from 1 to 1000"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(arguments, message, calibrate, monkeypatch):
    forbid_runs(monkeypatch)
    Path("taken.yaml").write_text("# mine\n")
    code, _, said = calibrate(*arguments)
    assert code == 2
    assert said.splitlines()[-1].startswith("psa-calibrate: error: ") and message in said
    assert Path("taken.yaml").read_text() == "# mine\n"


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        ("rules.yaml", ["--density", "0.2"], "--base-preset rules: has rules for steps, and one setting of a layer is"),
        ("short.yaml", ["--density", "0.2"], "--steps 4: with short all of them are dense"),
        ("short.yaml", ["--speedup", "2.1", "--steps", "8"], "--speedup 2.1: must be above 1 and below 2.00"),
    ],
)
def test_a_base_preset_says_which_steps_can_be_calibrated(base, target, message, calibrate, monkeypatch):
    forbid_runs(monkeypatch)
    code, _, said = calibrate(*target, base=base)
    assert code == 2 and message in said.splitlines()[-1]


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


def test_other_settings_do_not_mix(calibrate, monkeypatch):
    Path("mine.calibration").mkdir()
    Path("mine.calibration", "measurements.json").write_text('{"key": {"seed": 7}, "entries": {}}')
    forbid_runs(monkeypatch)
    code, _, said = calibrate("--density", "0.4")
    assert code == 2
    assert "mine.calibration: holds measurements of other settings" in said
    assert "seed" in said
