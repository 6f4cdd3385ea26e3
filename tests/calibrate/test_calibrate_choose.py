"""Choosing shapes of attention: densities are equal, the least error is found, targets are aimed at."""

import math

import pytest

from psa_diffusers import Preset
from psa_diffusers.calibrate.choose import Curve, everywhere, layer_by_layer, ranked, reach, solve
from psa_diffusers.calibrate.intervals import half_interval
from psa_diffusers.calibrate.result import make_preset
from psa_diffusers.calibrate.scaling import SCALES, known_density, scaled_settings, scaled_spec
from psa_diffusers.calibrate.shapes import BASE, SHAPES, shaped, shapes_for
from psa_diffusers.calibrate.targets import density_for_psnr, density_for_speedup, one_target
from psa_diffusers.calibrate.trials import SINGLES, Candidate, Trial, candidates, keep
from psa_diffusers.errors import InputError
from psa_kernels import AttentionSpec

DENSITIES = [0.05, 0.14, 0.3, 0.7]


def curve(weight: float, known=None) -> Curve:
    return Curve(DENSITIES, [weight / density for density in DENSITIES], known or (lambda scale: None))


LAYERS = {
    0: {BASE: curve(1), "raster": curve(0.5), "tiles": curve(2)},
    3: {BASE: curve(3), "raster": curve(4), "tiles": curve(2)},
}


def test_the_least_error_of_each_layer_and_of_all():
    assert layer_by_layer(LAYERS, 0.2) == {0: "raster", 3: "tiles"}
    assert ranked(LAYERS, 0.2) == ["raster", BASE, "tiles"]
    assert curve(1).error_at(0.2) == pytest.approx(1 / 0.2)


def test_candidates_go_from_simple_to_special_and_none_comes_twice():
    found = candidates({"transformer": LAYERS}, 0.2)
    assert [each.name for each in found] == [BASE, "raster", "tiles", "layer by layer"]
    assert len(found) <= SINGLES + 2
    alike = {layer: {BASE: curve(2), "raster": curve(1)} for layer in (0, 1)}
    assert [each.name for each in candidates({"transformer": alike}, 0.2)] == [BASE, "raster"]
    two = candidates({"transformer": alike, "transformer_2": {0: {BASE: curve(2), "tiles": curve(1)}}}, 0.2)
    assert [each.name for each in two] == [BASE, "raster / tiles"]


def test_measured_densities_are_met_in_between():
    found = solve(LAYERS, {0: "raster", 3: "tiles"}, 0.2)
    assert found.density == pytest.approx(0.2, rel=0.01)
    assert SCALES[1] < found.scales[0] == found.scales[3] < SCALES[2]
    assert reach(LAYERS, everywhere(LAYERS, BASE)) == pytest.approx((0.05, 0.7))


def test_known_densities_are_met_as_nearly_as_blocks_allow():
    spec = AttentionSpec()
    layers = {0: {BASE: curve(1, lambda scale: known_density(scaled_spec(spec, scale), 81))}}
    for density in (0.1, 0.2, 0.4, 0.8):
        found = solve(layers, {0: BASE}, density)
        assert (
            found.density == known_density(scaled_spec(spec, found.scales[0]), 81) == pytest.approx(density, abs=0.006)
        )
    assert reach(layers, {0: BASE})[1] == 1.0


def test_what_is_kept_beats_the_simpler_by_more_than_chance():
    def trial(name, shapes, psnrs):
        return Trial(Candidate(name, {"transformer": shapes}), psnrs, 0.2)

    base = trial(BASE, {0: BASE, 1: BASE}, [30.0, 31, 29, 30, None])
    raster = trial("raster", {0: "raster", 1: "raster"}, [32.1, 33, 31, 31.9, 50])
    mixed = trial("mixed", {0: "raster", 1: BASE}, [33.1, 33.2, 30.9, 32.1, 50])
    assert keep([base, raster, mixed])[0] is raster
    rows = keep([base, raster, mixed])[1]
    assert rows[1]["gain_db"] == pytest.approx(2.0) and 0 < rows[1]["gain_interval_db"] < 0.3
    better = trial("mixed", {0: "raster", 1: BASE}, [35.1, 36.2, 34.0, 35.0, None])
    assert keep([base, raster, better])[0] is better
    noisy = trial("raster", {0: "raster", 1: "raster"}, [40.0, 25, 29.5, 30, None])
    assert keep([base, noisy])[0] is base


def test_shapes_that_do_not_fit_the_base_preset_are_left_out():
    found = shapes_for(Preset(), 4)
    assert next(iter(found)) == BASE and {"hilbert", "hilbert, 32 keys"}.isdisjoint(found)  # the base's own order
    assert len(found) == len(SHAPES) - 2
    assert all(spec.block_key >= 8 * max(spec.levels) for each in found.values() for spec in each.layer_specs(4))
    # Levels of eight leave a block of 32 keys four rows; 64 keys alone cannot be pooled so.
    narrow = shapes_for(Preset(levels=[1, 8], thresholds=[0.1, 0.4]), 4)
    assert {"32 keys", "raster, 32 keys"}.isdisjoint(narrow) and "raster" in narrow
    budget = shapes_for(Preset(rule="budget", density=0.2), 4)
    assert "raster, 32 keys" in budget and "raster, 32 keys, mass with a floor" not in budget
    dense_first = shaped(Preset(layers=[{"match": 0, "dense": True}]), "raster")
    assert dense_first.layer_specs(2)[0] is None and dense_first.layer_orders(2)[1].order == "raster"


def test_scaled_thresholds_are_valid_and_clamped():
    spec = AttentionSpec(rule="mass", floor=0.3)
    assert scaled_spec(spec, 4.0).thresholds == (0.6, 1.0, 1.0)
    assert scaled_spec(spec, 4.0).floor == 1.0
    assert scaled_spec(spec, 0.5).thresholds == (0.075, 0.125, 0.225)
    assert scaled_spec(AttentionSpec(thresholds=(0.0, 0.0, 0.0001)), 0.2).thresholds == (0.0, 0.0, 0.0001)
    budget = AttentionSpec(rule="budget", density=0.2)
    assert scaled_spec(budget, 0.5).density == 0.1 and scaled_settings(budget, 9.0) == {"density": 1.0}


def test_a_density_by_count_is_known_and_others_are_not():
    # 20 key blocks: 3 exact, 2 at half, 4 at a quarter of the work.
    assert known_density(AttentionSpec(), 20) == pytest.approx((3 + 2 / 2 + 4 / 4) / 20)
    assert known_density(scaled_spec(AttentionSpec(), 10.0), 20) == 1.0
    assert known_density(AttentionSpec(rule="mass"), 20) is None
    assert known_density(AttentionSpec(similarity=(0.7, 0.6)), 20) is None


@pytest.mark.parametrize(
    ("count", "quantile"), [(4, 3.182446), (5, 2.776445), (8, 2.364624), (31, 2.042272), (121, 1.979930)]
)
def test_half_an_interval_is_students(count, quantile):
    """Against the quantiles of the published tables."""
    values = [(-1) ** index * 50.0 for index in range(count)]
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    assert half_interval(values) == pytest.approx(quantile * deviation / math.sqrt(count), abs=7e-5)
    assert half_interval(values[:3]) is None and half_interval([1.5] * count) == 0


def solution(shapes: dict[int, str]):
    layers = {layer: {shape: curve(1)} for layer, shape in shapes.items()}
    return solve(layers, shapes, 0.3)


def test_one_shape_for_all_layers_needs_no_rules():
    made = make_preset(Preset(dense_steps=0.5), solution(dict.fromkeys(range(3), "raster, 32 keys")), 3, "mine", "test")
    assert made.layers == () and made.order == "raster" and made.dense_steps == 0.5
    assert (made.block.query, made.block.key) == (128, 32) and made.thresholds[0] > 0.15


def test_rules_of_layers_alike_are_one_and_the_base_keeps_its_own():
    base = Preset(name="base", dense_steps=0.5, layers=[{"match": "0", "dense": True}, {"match": "3", "rest": "mean"}])
    made = make_preset(base, solution({1: "raster", 2: "32 keys", 3: "raster"}), 5, "mine", "a test")
    specs, orders = made.layer_specs(5), [each.order for each in made.layer_orders(5)]
    assert specs[0] is None and orders == ["hilbert", "raster", "hilbert", "raster", "hilbert"]
    assert specs[1].thresholds == specs[3].thresholds == specs[2].thresholds > specs[4].thresholds
    assert (specs[3].rest, specs[1].rest) == ("mean", "skip")
    assert (specs[2].block_query, specs[2].block_key, specs[1].block_key) == (128, 32, 64)
    assert (made.name, made.dense_steps, len(made.layers)) == ("mine", 0.5, 4)
    assert make_preset(base, None, 5, "mine", "").layers == base.layers


def test_a_psnr_is_met_at_little_more_than_it_needs():
    def psnr_at(density: float) -> float:
        return 36 + 5 * math.log(density)

    for target in (22.0, 27.0, 33.0):
        density, tried = density_for_psnr(target, 0.05, psnr_at)
        assert target <= psnr_at(density) <= target + 0.6
        assert len(tried) <= 5
    # Out of reach: the highest density that was tried.
    assert density_for_psnr(50.0, 0.05, psnr_at)[0] > 0.7


def test_a_speedup_follows_the_timed_steps():
    timed = {"dense": 10.0, "sparse": [(0.4, 6.0), (0.1, 3.0)]}
    # Twice as fast: 16 steps in 80 s, of which 4 dense ones take 40 s; the other 12 may take 3.33 s each.
    assert density_for_speedup(2.0, 16, 4, timed, 0.05) == pytest.approx(0.1 + (40 / 12 - 3) / 10)
    with pytest.raises(InputError, match=r"--speedup 3: out of reach; at density 0.05 denoising is 2.2\d times"):
        density_for_speedup(3.0, 16, 4, timed, 0.05)
    for sparse in ([(0.4, 3.0), (0.1, 3.0)], [(0.5, 3.0), (0.5, 3.0)], [(0.5, 3.0), (0.5, 4.0)]):
        with pytest.raises(InputError, match="the work does not set the time here"):
            density_for_speedup(1.1, 16, 4, {"dense": 10.0, "sparse": sparse}, 0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), "give one target"),
        ((25.0, 0.2, None), "give one target"),
        ((99.0, None, None), "--target-psnr 99: must be from 5 to 55 dB"),
        ((None, 1.5, None), "--density 1.5: must be from 0.01 to 0.95"),
        ((None, None, 1.0), "--speedup 1: must be above 1"),
        ((None, None, 4.0), "--speedup 4: must be above 1 and below 4.00, because the base preset keeps 25% of"),
        ((None, None, float("nan")), "--speedup nan"),
    ],
)
def test_targets_that_make_no_sense(given, message):
    with pytest.raises(InputError, match=message):
        one_target(*given, dense_share=0.25)
