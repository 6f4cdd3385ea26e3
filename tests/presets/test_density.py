"""A preset at another density: what it costs is what was asked, and what is out of reach is told."""

import itertools

import pytest
import torch

from psa_kernels import AttentionSpec, AttentionStats
from psa_kernels.allocation.reference import allocate
from psa_presets import Preset, PresetError, choose_preset, load_preset
from psa_presets.files import shipped_folder
from psa_testing.preset_checks import message_of


def density_of(spec: AttentionSpec, blocks: int = 10_000) -> float:
    """What one row of blocks costs by the operator's own count, where all have another importance."""
    importance = torch.arange(blocks, 0, -1, dtype=torch.float32)[None, None, None]
    return AttentionStats.from_lists(allocate(importance, None, spec), spec, "").density.item()


@pytest.mark.parametrize(
    ("density", "thresholds"),
    [
        (0.05, (0.03, 0.05, 0.09)),
        (0.10, (0.06, 0.10, 0.18)),
        (0.15, (0.09, 0.15, 0.27)),
        (0.25, (0.15, 0.25, 0.45)),
        (0.35, (0.21, 0.35, 0.63)),
        (0.5, (0.3, 0.5, 0.9)),
        (1, (1.0, 1.0, 1.0)),
    ],
)
def test_psa_3_keeps_its_proportions(density, thresholds):
    changed = load_preset("psa-3").at_density(density)
    assert changed.thresholds == thresholds
    assert changed == load_preset("psa-3").replace(thresholds=thresholds)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"floor": 0.05},
        {"floor": 0.3},
        {"rest": "mean"},
        {"rest": "mean", "block": {"query": 64, "key": 16}},
        {"levels": [2, 8], "thresholds": [0.1, 1.0], "rest": "mean"},
        {"levels": [1, 2, 8], "thresholds": [0.1, 0.1, 0.7], "floor": 0.2, "rest": "mean"},
        {"levels": [1], "thresholds": [0.7]},
        {"layers": [{"match": "1-", "order": "tiles"}, {"match": 2, "dense": True}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("density", [0.08, 0.3, 0.47])
def test_the_density_is_the_one_that_was_asked(settings, density):
    preset = Preset(**settings)
    changed = preset.at_density(density)
    specs = changed.layer_specs(3)
    assert len({spec for spec in specs if spec}) == 1 and density_of(specs[0]) == pytest.approx(density, abs=5e-4)
    kept = {"thresholds", "floor"}
    assert changed.model_dump(exclude=kept) == preset.model_dump(exclude=kept)
    ends = zip((*changed.thresholds, changed.floor), (*preset.thresholds, preset.floor), strict=True)
    factors = {round(new / old, 3) for new, old in ends if new < 1 and old}
    assert len(factors) <= 1, "not in proportion"
    assert changed.at_density(density).thresholds == pytest.approx(changed.thresholds, abs=3e-6)


def test_the_rule_budget_is_given_another_budget():
    preset = Preset(rule="budget", density=0.5, levels=[1, 2, 8])
    assert preset.at_density(0.3) == preset.replace(density=0.3) and preset.at_density(1).density == 1


def test_what_rules_keep_dense_is_not_counted():
    preset = Preset(layers=[{"match": 0, "dense": True}], steps=[{"match": "90%-", "dense": True}])
    changed = preset.at_density(0.3)
    assert changed.thresholds == Preset().at_density(0.3).thresholds
    assert (changed.layers, changed.steps) == (preset.layers, preset.steps)


def test_a_density_alone_means_psa_auto_and_nothing_psa_3():
    assert choose_preset(None) == load_preset("psa-3")
    assert choose_preset(None, 0.2) == load_preset("psa-auto").at_density(0.2) != load_preset("psa-auto")
    assert choose_preset("psa-3", 0.2) == load_preset("psa-3").at_density(0.2)
    mine = Preset(rule="budget", density=0.5)
    assert choose_preset(mine) is mine and choose_preset(mine, 0.2).density == 0.2
    with pytest.raises(PresetError, match=r"psa-auto.*density = 1.5: not a share of dense attention; allowed"):
        choose_preset(None, 1.5)


def test_past_the_coarsest_threshold_the_finer_ones_grow():
    """psa-3's last threshold reaches 1 at density 0.25 / 0.45; then no block is left out, and more are kept finer."""
    densities = [0.5, 0.56, 0.6, 0.75, 0.9, 0.99, 1]
    presets = [load_preset("psa-3").at_density(density) for density in densities]
    for preset, density in zip(presets, densities, strict=True):
        assert density_of(preset.layer_specs(1)[0]) == pytest.approx(density, abs=5e-4)
    assert [preset.thresholds[-1] for preset in presets] == [0.9, *[1.0] * 6]
    assert all(a.thresholds[0] < b.thresholds[0] for a, b in itertools.pairwise(presets))


@pytest.mark.parametrize(
    ("settings", "density", "expected"),
    [
        ({}, 0, "density = 0: not a share of dense attention; allowed: a number above 0 and up to 1"),
        ({}, 1.01, "density = 1.01: not a share"),
        ({}, -0.2, "density = -0.2: not a share"),
        ({}, float("nan"), "density = nan: not a share"),
        ({}, "0.2", "density = '0.2': not a share"),
        ({}, True, "density = true: not a share"),
        ({}, None, "density = null: not a share"),
        (
            {},
            1e-9,
            "density = 1e-09: rounded to 6 digits, all thresholds would be 0; "
            "allowed: a number from 5.5555556e-07 to 1",
        ),
        (
            {"floor": 0.3, "rest": "mean"},
            0.0156251,
            "density = 0.0156251: rounded to 6 digits, all thresholds would be 0; "
            "allowed: a number from 0.015625734 to 1",
        ),
        (
            {"thresholds": [0, 0, 1]},
            0.3,
            "density = 0.3: out of reach for the thresholds [0.0, 0.0, 1.0] of the levels [1, 2, 4]; "
            "allowed: a number above 0 and up to 0.25",
        ),
        ({"levels": [2], "thresholds": [0.1]}, 0.6, "allowed: a number above 0 and up to 0.5"),
        ({"rest": "mean"}, 0.01, "allowed: a number above 0.015625 and up to 1"),
        ({"rule": "budget", "density": 0.2, "rest": "mean"}, 0.01, "density = 0.01: the mean tokens alone are 1 / 64"),
        ({"rule": "mass"}, 0.2, "rule = 'mass': the density depends on the video; allowed: count or budget"),
        ({"similarity": [0.7, 0.6]}, 0.2, "similarity = [0.7, 0.6]: the density depends on the video; allowed: null"),
        ({"layers": [{"match": 1}, {"match": 2, "floor": 0.3}]}, 0.2, "layers[1].floor = 0.3: gives layers another"),
        ({"layers": [{"match": 1, "thresholds": [0.1, 0.2, 0.3]}]}, 0.2, "layers[0].thresholds = [0.1, 0.2, 0.3]"),
    ],
    ids=str,
)
def test_what_is_out_of_reach_is_told(settings, density, expected):
    message = message_of(lambda: Preset(name="mine", **settings).at_density(density))
    assert message.startswith("preset 'mine': ") and expected in message and "allowed: " in message


def test_a_file_is_named():
    message = message_of(lambda: load_preset("psa-2").at_density(0.5))
    assert message.startswith(f"{shipped_folder() / 'psa-2.yaml'}: density = 0.5: out of reach")
    message = message_of(lambda: load_preset("psa-2").replace(refresh=2).at_density(0.5))
    assert message.startswith(f"{shipped_folder() / 'psa-2.yaml'} (changed in code): density = 0.5: out of reach")
