"""Spreading work over layers: the optimum is found, targets are aimed at."""

import itertools
import math

import numpy as np
import pytest

from psa_diffusers import Preset
from psa_diffusers.calibrate.scaling import DENSE, SCALES, known_density, scaled_preset, scaled_spec
from psa_diffusers.calibrate.solve import Curve, drawn_together, judged, reachable, spread, uniform
from psa_diffusers.calibrate.targets import density_for_psnr, density_for_speedup, one_target
from psa_diffusers.errors import InputError
from psa_kernels import AttentionSpec

DENSITIES = [0.05, 0.083, 0.14, 0.25, 0.43, 0.66]


def curve(weight: float, decay: float) -> Curve:
    return Curve(SCALES, DENSITIES, [weight * math.exp(-decay * density) for density in DENSITIES])


@pytest.mark.parametrize("density", [0.08, 0.15, 0.3, 0.6])
def test_the_least_error_for_a_density(density):
    curves = {0: curve(1.0, 10), 1: curve(0.2, 4), 5: curve(3.0, 20)}
    found = spread(curves, density)
    assert found.density <= density + 1e-9
    assert found.density > density - 0.01
    # Brute force over what the three layers may choose, on a grid of its own.
    grid = np.linspace(0.05, 0.66, 40)
    errors = [
        [c.errors[0] * math.exp(-rate * (d - 0.05)) for d in grid]
        for c, rate in zip(curves.values(), (10, 4, 20), strict=True)
    ]
    least = min(
        sum(errors[layer][index] for layer, index in enumerate(picked))
        for picked in itertools.product(range(40), repeat=3)
        if grid[list(picked)].mean() <= density
    )
    assert found.error <= least * 1.02
    assert found.error < uniform(curves, found.density).error


def test_a_layer_that_does_not_matter_gets_the_least_and_one_that_matters_most_stays_dense():
    curves = {0: curve(1e-9, 1), 1: curve(1e9, 1), 2: curve(1e-9, 1)}
    found = spread(curves, 0.367)
    assert found.scales[1] is DENSE
    assert found.scales[0] == found.scales[2] == pytest.approx(SCALES[0])
    assert reachable(curves) == pytest.approx(0.05)


def test_errors_that_are_drawn_together():
    curves = {0: curve(1.0, 10), 1: curve(0.01, 4)}
    densities = []
    for strength in (0.0, 0.5, 1.0):
        found = judged(curves, spread(drawn_together(curves, strength), 0.25))
        densities.append(found.scales[0] / found.scales[1])
        assert found.density <= 0.25
    assert densities[0] == pytest.approx(1, abs=0.06) and densities[0] < densities[1] <= densities[2]
    assert judged(curves, spread(curves, 0.25)) == spread(curves, 0.25)


def test_less_than_can_be_had_gives_the_least():
    assert spread({0: curve(1, 1)}, 0.01).density == pytest.approx(0.05)


def test_scaled_thresholds_are_valid_and_clamped():
    spec = AttentionSpec(rule="mass", floor=0.3)
    assert scaled_spec(spec, 4.0).thresholds == (0.6, 1.0, 1.0)
    assert scaled_spec(spec, 4.0).floor == 1.0
    assert scaled_spec(spec, 0.5).thresholds == (0.075, 0.125, 0.225)
    assert scaled_spec(AttentionSpec(thresholds=(0.0, 0.0, 0.0001)), 0.2).thresholds == (0.0, 0.0, 0.0001)


def test_a_density_by_count_is_known_and_others_are_not():
    # 20 key blocks: 3 exact, 2 at half, 4 at a quarter of the work.
    assert known_density(AttentionSpec(), 20) == pytest.approx((3 + 2 / 2 + 4 / 4) / 20)
    assert known_density(scaled_spec(AttentionSpec(), 10.0), 20) == 1.0
    assert known_density(AttentionSpec(rule="mass"), 20) is None
    assert known_density(AttentionSpec(similarity=(0.7, 0.6)), 20) is None


def test_known_densities_are_used_between_the_measured_ones():
    def known(scale: float) -> float:
        return math.ceil(scale * 5) / 20

    found = spread({0: Curve(SCALES, [known(scale) for scale in SCALES], [1, 0.5, 0.2, 0.1, 0.05, 0.01], known)}, 0.41)
    assert found.density == known(found.scales[0]) == 0.4


def test_rules_of_layers_alike_are_one_and_the_base_keeps_its_own():
    base = Preset(name="base", dense_steps=0.5, layers=[{"match": "0", "dense": True}, {"match": "3", "rest": "mean"}])
    made = scaled_preset(base, {1: 2.0, 2: DENSE, 3: 2.0}, 5, "mine", "a test")
    specs = made.layer_specs(5)
    assert specs[0] is None and specs[2] is None
    assert specs[1].thresholds == specs[3].thresholds == (0.3, 0.5, 0.9)
    assert (specs[3].rest, specs[1].rest) == ("mean", "skip")
    assert specs[4].thresholds == (0.15, 0.25, 0.45)
    assert (made.name, made.dense_steps, len(made.layers)) == ("mine", 0.5, 4)


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
    with pytest.raises(InputError, match="the work does not set the time here"):
        density_for_speedup(1.1, 16, 4, {"dense": 10.0, "sparse": [(0.4, 3.0), (0.1, 3.0)]}, 0.05)


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
