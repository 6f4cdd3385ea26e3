"""Steps of a run in a preset: dense ones by share or number at both ends, and rules for some of them."""

import functools
import pickle

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_presets import Preset, load_preset
from psa_presets.fields import LayerRule, StepRule
from psa_presets.files import shipped_folder
from psa_presets.layers import MAX_CASES
from psa_presets.steps import possible_sets, rules_at
from psa_testing.preset_checks import message_of, write_file


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


# Dense steps


@pytest.mark.parametrize(
    ("first", "last", "steps", "counts", "sparse"),
    [
        (1, 0, 4, (1, 0), (1, 2, 3)),
        (1, 1, 4, (1, 1), (1, 2)),
        (0, 2, 4, (0, 2), (0, 1)),
        (3, 0, 50, (3, 0), tuple(range(3, 50))),
        (0.25, 0.25, 8, (2, 2), (2, 3, 4, 5)),
        (0.25, 0.1, 4, (1, 1), (1, 2)),  # both are rounded up
        (1.0, 0, 4, (4, 0), ()),
        (0, 1.0, 4, (0, 4), ()),
        (0.5, 0.5, 3, (2, 1), ()),  # where they meet, no step counts twice
        (1, 1, 1, (1, 0), ()),
        (5, 5, 4, (4, 0), ()),
        (0.25, 0, 2, (1, 0), (1,)),
        (0.25, 0, 1, (1, 0), ()),
        (0, 0, 3, (0, 0), (0, 1, 2)),
        (2, 2, 0, (0, 0), ()),
    ],
)
def test_dense_steps_at_both_ends(first, last, steps, counts, sparse):
    preset = Preset(dense_steps=first, dense_last=last)
    assert (preset.dense_step_count(steps), preset.dense_last_count(steps)) == counts
    assert preset.sparse_steps(steps) == sparse


def test_an_integer_is_a_number_of_steps_and_a_float_a_share(write):
    one, all_of_them = load_preset(write("dense_steps: 1")), load_preset(write("dense_steps: 1.0"))
    assert [preset.dense_step_count(50) for preset in (one, all_of_them)] == [1, 50]
    assert [preset.is_all_dense for preset in (one, all_of_them)] == [False, True]
    assert one != all_of_them and one == Preset(name="mine", dense_steps=1)
    assert Preset(dense_last=1) != Preset(dense_last=1.0)
    assert Preset(dense_steps=0) == Preset(dense_steps=0.0) and hash(Preset(dense_last=0)) == hash(Preset())
    for preset in (one, all_of_them):
        again = yaml.safe_load(yaml.safe_dump(preset.model_dump(mode="json", exclude_unset=True)))
        assert preset == Preset(**again) == pickle.loads(pickle.dumps(preset)) == preset.replace()


def test_dense_last_is_none_unless_it_is_asked_for():
    assert {
        load_preset(name).dense_last_count(50) for name in ("psa-1", "psa-3", shipped_folder() / "example.yaml")
    } == {0}


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"dense_steps": 1.0}, True),
        ({"dense_last": 1.0}, True),
        ({"dense_steps": 0.3, "dense_last": 0.7}, True),
        ({"dense_steps": 0.3, "dense_last": 0.6}, False),
        ({"dense_steps": 100}, False),  # longer runs have sparse steps
        ({"steps": [{"match": "0-", "dense": True}]}, True),
        ({"steps": [{"match": "0-60%", "dense": True}, {"match": "50%-", "dense": True}]}, True),
        ({"steps": [{"match": "0-60%", "dense": True}, {"match": "61%-", "dense": True}]}, False),
        ({"steps": [{"match": "0-", "dense": True}, {"match": 3, "dense": False}]}, False),
        ({"dense_steps": 0.5, "steps": [{"match": "50%-", "dense": True}]}, True),
        ({"dense_steps": 0.07, "steps": [{"match": "7%-", "dense": True}]}, True),
        ({"dense_steps": 0.5, "steps": [{"match": "51%-", "dense": True}]}, False),
        ({"dense_steps": 1, "steps": [{"match": "1-", "dense": True}]}, True),
        ({"dense_steps": 1, "steps": [{"match": "2-", "dense": True}]}, False),
        ({"dense_steps": 2**31 - 1, "steps": [{"match": "2-", "dense": True}]}, True),
        ({"dense_last": 0.5, "steps": [{"match": "0-50%", "dense": True}]}, True),
        ({"dense_last": 0.4, "steps": [{"match": "0-50%", "dense": True}]}, False),
        ({"dense_last": 3, "steps": [{"match": "0-50%,4-", "dense": True}]}, True),
        ({"dense_last": 2, "steps": [{"match": "0-50%,4-", "dense": True}]}, False),
        ({"dense_last": 2, "steps": [{"match": "4-", "dense": True}]}, False),
        ({"dense_steps": 0.3, "dense_last": 0.2, "steps": [{"match": "30-80%", "dense": True}]}, True),
        ({}, False),
    ],
    ids=str,
)
def test_a_preset_knows_whether_it_is_ever_sparse(settings, dense):
    assert Preset(**settings).is_all_dense == dense
    assert dense == (not any(Preset(**settings).sparse_steps(steps) for steps in range(1, 120)))


def test_a_step_that_no_run_has_is_refused():
    for step, steps in ((-1, 4), (4, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"step={step}: expected 0 to {steps - 1}"):
            Preset().step_rules_at(step, steps)
    with pytest.raises(ValueError, match="num_steps=-1"):
        Preset().dense_last_count(-1)


# Which steps a rule names


@pytest.mark.parametrize(
    ("match", "steps", "named"),
    [
        *[(3, 8, {3}), ("3", 8, {3}), ("0-1", 8, {0, 1}), ("5-", 8, {5, 6, 7}), ("0,2,4-5", 8, {0, 2, 4, 5})],
        *[(" 1 - 2 , 4 ", 8, {1, 2, 4}), ("0-", 3, {0, 1, 2}), ("4-", 4, set()), ("2-9", 4, {2, 3})],
        *[("0-30%", 10, {0, 1, 2}), ("0-30%", 4, {0, 1}), ("0-30%", 1, {0}), ("0% - 30%", 10, {0, 1, 2})],
        *[
            ("30-50%", 10, {3, 4}),
            ("30%-", 4, {2, 3}),
            ("75%-", 4, {3}),
            ("90%-", 4, set()),
            ("0-100%", 4, {0, 1, 2, 3}),
        ],
        *[("0-10%,90%-", 20, {0, 1, 18, 19}), ("0,75%-", 4, {0, 3}), ("33.4-66.7%", 3, {2}), ("33-67%", 3, {1, 2})],
        *[("12.5%-", 8, {1, 2, 3, 4, 5, 6, 7}), ("7-14%", 100, set(range(7, 14)))],
    ],
)
def test_match_selects_steps(match, steps, named):
    preset = Preset(steps=[{"match": match, "dense": True}], dense_steps=0)
    assert set(range(steps)).difference(preset.sparse_steps(steps)) == named


@settings(max_examples=200, deadline=None, derandomize=True)
@given(border=st.integers(1, 99), steps=st.integers(1, 300))
def test_shares_that_meet_name_each_step_once(border, steps):
    rules = [f"0-{border}%", f"{border}%-"]
    held = [rules_at(rules, step, steps) for step in range(steps)]
    first = Preset(dense_steps=border / 100).dense_step_count(steps)
    assert held == [(0,)] * first + [(1,)] * (steps - first), "as many as that share of dense steps"


PARTS = st.one_of(
    st.integers(0, 5).map(str),
    st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: f"{pair[0]}-{sum(pair)}"),
    st.integers(0, 5).map(lambda first: f"{first}-"),
    st.tuples(st.integers(0, 9), st.integers(1, 5)).map(lambda pair: f"{10 * pair[0]}-{min(100, 10 * sum(pair))}%"),
    st.integers(0, 9).map(lambda first: f"{10 * first}%-"),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rules=st.lists(st.lists(PARTS, min_size=1, max_size=2).map(",".join), max_size=3))
def test_the_possible_sets_are_those_of_all_runs(rules):
    """Borders at tenths and at steps up to 6: runs of up to 70 steps have all that there is."""
    seen = {rules_at(rules, step, steps) for steps in range(1, 71) for step in range(steps)}
    assert set(possible_sets(rules)) == seen


# What the rules change


def specs_at(preset, step, steps, num_layers=3):
    return preset.layer_specs(num_layers, preset.step_rules_at(step, steps))


def test_rules_for_steps_come_after_those_for_layers():
    preset = Preset(
        layers=[
            {"match": 0, "dense": True},
            {"match": 1, "floor": 0.1, "rest": "mean", "importance": {"key_stride": 4}},
        ],
        steps=[
            {"match": "0-50%", "floor": 0.2, "importance": {"statistic": "mean"}},
            {"match": 0, "floor": 0.3, "dense": False},
        ],
        dense_steps=0,
    )
    floors = [[spec and spec.floor for spec in specs_at(preset, step, 4)] for step in range(4)]
    assert floors == [[0.3, 0.3, 0.3], [None, 0.2, 0.2], [None, 0.1, 0.0], [None, 0.1, 0.0]]
    changed, plain = specs_at(preset, 1, 4), specs_at(preset, 2, 4)
    assert (changed[1].rest, changed[1].importance.key_stride, changed[1].importance.statistic) == ("mean", 4, "mean")
    assert changed[2].importance.key_stride == 8 and plain == preset.layer_specs(3)
    assert preset.may_undo_dense and not preset.replace(steps=preset.steps[:1]).may_undo_dense


def test_a_density_may_fall_over_the_run_and_the_order_change():
    preset = Preset(
        rule="budget",
        density=0.1,
        order="raster",
        steps=[{"match": "0-50%", "density": 0.4}, {"match": "50-75%", "density": 0.2, "order": "tiles"}],
    )
    assert [specs_at(preset, step, 8)[0].density for step in range(8)] == [0.4] * 4 + [0.2] * 2 + [0.1] * 2
    orders = [preset.layer_orders(1, preset.step_rules_at(step, 8))[0].order for step in range(8)]
    assert orders == ["raster"] * 4 + ["tiles"] * 2 + ["raster"] * 2


def test_dense_by_a_rule_counts_with_the_dense_phase():
    preset = Preset(dense_steps=1, dense_last=1, steps=[{"match": "2-", "dense": True}, {"match": "3", "dense": False}])
    assert preset.sparse_steps(6) == (1, 3) and preset.sparse_steps(4) == (1,)
    assert specs_at(preset, 2, 6) == (None,) * 3 and None not in specs_at(preset, 3, 6)


def test_rules_must_fit_together_in_a_run_of_any_length():
    short = [{"match": "0-3", "levels": [1, 2]}, {"match": "0-3", "thresholds": [0.2, 0.4]}]
    assert [spec.levels for spec in specs_at(Preset(steps=short), 3, 9)] == [(1, 2)] * 3
    message = message_of(lambda: Preset(steps=[short[0], {"match": "0-50%", "thresholds": [0.2, 0.4]}]))
    assert "steps[0].levels = [1, 2]: thresholds has length 3, levels [1, 2] needs 2" in message  # at step 3 of 4
    rules = {
        "layers": [{"match": 2, "levels": [1, 2, 8], "block": {"key": 64}}],
        "steps": [{"match": 0, "block": {"key": 16}}],
    }
    assert Preset(**rules).layer_specs(3, (0,))[2].block_key == 16
    rules["layers"][0]["levels"] = [1, 2, 32]
    message = message_of(lambda: Preset(**rules))
    assert "steps[0].block.key = 16: level 32 does not divide block.key = 16" in message
    rules["steps"] = [{"match": "2-", "rest": "skip"}]
    assert Preset(**rules).layer_specs(3)


def test_a_conflict_with_the_layers_that_there_are_names_the_rule_for_steps(write):
    three = "levels: [1, 2, 4], thresholds: [0.1, 0.2, 0.3]"
    layers = f"{{match: 1-, levels: [1, 2], thresholds: [0.2, 0.4]}}, {{match: 1, {three}}}"
    path = write(f"layers: [{layers}]\nsteps: [{{match: 50%-, thresholds: [0.1, 0.2, 0.3]}}]")
    preset = load_preset(path)
    assert preset.layer_specs(2)
    message = message_of(lambda: preset.layer_specs(3))
    assert message.startswith(
        f"{path}: steps[0].thresholds = [0.1, 0.2, 0.3]: thresholds has length 3, levels [1, 2] needs 2"
    )


def test_too_many_ways_to_meet_are_refused():
    layers = [{"match": index, "floor": 0.1} for index in range(150)]
    steps = [{"match": f"{index}-{index + 10},{index}%-", "floor": 0.1} for index in range(20)]
    message = message_of(lambda: Preset(layers=layers, steps=steps))
    assert "layers and steps meet in" in message and message.endswith(f"allowed: up to {MAX_CASES}")


# Changes in code


def test_a_density_needs_rules_that_leave_it_alone():
    preset = Preset(name="mine", steps=[{"match": "0-50%", "order": "raster"}, {"match": "90%-", "dense": True}])
    assert preset.at_density(0.15).steps == preset.steps
    changed = preset.replace(steps=[*preset.steps, {"match": 1, "thresholds": [0.1, 0.2, 0.3]}])
    message = message_of(lambda: changed.at_density(0.15))
    assert message.startswith("preset 'mine': steps[2].thresholds = [0.1, 0.2, 0.3]: gives steps another density; ")
    assert "for one density in all sparse steps, rules without block, levels" in message


def test_rules_for_steps_survive_replacing_dumping_and_pickling():
    preset = Preset(dense_last=2, steps=[{"match": "0-30%", "floor": 0.0}, StepRule(match=4, dense=True)])
    again = Preset(**yaml.safe_load(yaml.safe_dump(preset.model_dump(mode="json", exclude_unset=True))))
    assert preset == again == pickle.loads(pickle.dumps(preset)) == preset.replace() and hash(preset) == hash(again)
    assert preset != preset.replace(steps=[{"match": "0-30%"}, preset.steps[1]]), (
        "a rule that says a default changes it"
    )
    assert LayerRule(match=4, dense=True) != StepRule(match=4, dense=True)
