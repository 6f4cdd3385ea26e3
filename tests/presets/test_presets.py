"""Presets: what ships, where presets are found, what one means per layer, and changing one in code."""

import functools
import itertools
import json
import os
import pickle

import pytest
import yaml

from psa_kernels import AttentionSpec, Importance
from psa_presets import Preset, PresetError, list_presets, load_preset
from psa_presets.fields import LayerRule
from psa_presets.files import shipped_folder
from psa_testing.preset_checks import message_of, write_file

EXAMPLE = shipped_folder() / "example.yaml"
PUBLISHED = {  # share of blocks in percent at pooling 1, 2, 4 and skipped
    "psa-1": (25, 0, 0, 75),
    "psa-2": (0, 0, 100, 0),
    "psa-3": (15, 10, 20, 55),
    "psa-4": (10, 20, 20, 50),
    "psa-5": (10, 10, 40, 40),
}
AUTHORS_MASS = {
    "mass-wan2.1-1.3b": (128, (0.5, 0.6, 0.7, 0.8), (0.7, 0.65, 0.6)),
    "mass-wan2.1-14b": (128, (0.4, 0.5, 0.6, 0.8), None),
    "mass-wan2.2-a14b": (32, (0.5, 0.6, 0.6, 0.8), None),
    "mass-wan2.2-5b": (32, (0.6, 0.7, 0.7, 0.8), None),
}

AUTHORS_COUNT = {"count-cogvideox-5b": (128, "raster"), "count-cogvideox1.5-5b": (32, "hilbert")}


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


def test_the_shipped_presets_are_listed_and_load_under_their_name():
    names = list_presets()
    assert names == sorted(names) and {*PUBLISHED, *AUTHORS_MASS, *AUTHORS_COUNT, "psa-auto"} <= set(names)
    for name in names:
        preset = load_preset(name)
        assert preset.name == name and preset.source
        assert len(preset.layer_specs(40)) == 40


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_allocations(name):
    preset = load_preset(name)
    (spec,) = set(preset.layer_specs(30))
    assert spec.levels == (1, 2, 4) and spec.rule == "count" and spec.floor == 0 and spec.similarity is None
    assert (spec.block_query, spec.block_key, spec.rest) == (128, 64, "skip")
    assert spec.importance == Importance("sampled", "max", 8, 8)
    shares = [round(100 * (high - low), 9) for low, high in itertools.pairwise((0, *spec.thresholds, 1))]
    assert shares == list(PUBLISHED[name])
    assert sum(share / pool for share, pool in zip(shares, spec.levels, strict=False)) == pytest.approx(25)
    assert preset.dense_steps == 0.25 and preset.order == "hilbert" and "2512.04025" in preset.source


def test_the_recommended_preset_is_psa_3_with_a_budget_kept_lists_and_correction():
    changed = {"name", "source", "rule", "density", "error_model", "refresh", "share_guidance", "correction"}
    auto, published = load_preset("psa-auto"), load_preset("psa-3")
    assert auto.model_dump(exclude=changed) == published.model_dump(exclude=changed)
    assert (auto.rule, auto.density, auto.share_guidance, auto.correction) == ("budget", 0.25, True, True)
    assert (auto.error_model, auto.refresh, auto.order) == ("auto", 4, "hilbert") and "docs/quality.md" in auto.source
    assert auto.at_density(0.15) == auto.replace(density=0.15)


@pytest.mark.parametrize("name", AUTHORS_MASS)
def test_the_authors_mass_presets(name):
    preset = load_preset(name)
    key, thresholds, similarity = AUTHORS_MASS[name]
    assert set(preset.layer_specs(30)) == {
        AttentionSpec(
            128, key, (1, 2, 4, 8), "mass", thresholds, 0.06, similarity, Importance("sampled", "max", 4, 4), "skip"
        )
    }
    assert (preset.dense_step_count(50), preset.dense_step_count(40)) == (15, 12)
    assert "be122cf" in preset.source and "ziplab" in preset.source


@pytest.mark.parametrize("name", AUTHORS_COUNT)
def test_the_authors_count_presets(name):
    preset = load_preset(name)
    key, order = AUTHORS_COUNT[name]
    thresholds = (0.10, 0.15, 0.15, 0.35)
    assert set(preset.layer_specs(42)) == {
        AttentionSpec(
            128, key, (1, 2, 4, 8), "count", thresholds, 0.0, None, Importance("sampled", "max", 4, 4), "skip"
        )
    }
    assert (preset.dense_step_count(50), preset.order) == (15, order)
    assert "be122cf" in preset.source and "ziplab" in preset.source


def test_the_example_is_a_file_to_copy_and_no_preset():
    assert "example" not in list_presets() and load_preset(str(EXAMPLE)) == load_preset(EXAMPLE)
    with pytest.raises(PresetError, match=r"not a preset but a file to copy: .*configs/example.yaml") as caught:
        load_preset("example")
    assert "\n" not in str(caught.value)


def test_the_example_names_every_key():
    text = (shipped_folder() / "example.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(Preset.model_fields)


def test_names_and_paths_work_from_any_working_directory(tmp_path, monkeypatch, write):
    path = write("thresholds: [0.1, 0.2, 0.3]", "mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_preset("psa-3").name == "psa-3"
    mine = load_preset("mine.yaml")
    assert mine == load_preset(path) == load_preset(str(path)) == load_preset(f".{os.sep}mine.yaml")
    assert mine.name == "mine" and mine.thresholds == (0.1, 0.2, 0.3) and mine.levels == (1, 2, 4)
    write("floor: 0.5", "plain")
    assert load_preset("plain").floor == 0.5
    write("floor: 0.5", "psa-3")
    assert load_preset("psa-3").floor == 0, "a shipped name wins"


def test_a_preset_survives_pickling_and_dumping():
    preset = load_preset(EXAMPLE)
    assert pickle.loads(pickle.dumps(preset)) == preset == Preset(**preset.model_dump(exclude_unset=True))
    assert hash(preset) == hash(load_preset(EXAMPLE))
    assert preset != load_preset("psa-3")


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ({"layers": [{"match": 1}]}, {"layers": [{"match": 1, "floor": 0.0}]}, False),
        ({"steps": [{"match": "0-50%"}]}, {"steps": [{"match": "0-50%", "dense": False}]}, False),
        ({"steps": [{"match": 0, "block": {"key": 64}}]}, {"steps": [{"match": 0, "block": {}}]}, False),
        ({"dense_steps": 1}, {"dense_steps": 1.0}, False),
        ({"layers": [{"match": 1, "floor": 0}]}, {"layers": [{"floor": -0.0, "match": "1"}]}, True),
        ({"block": {"key": 64}, "dense_last": -0.0}, {"levels": (1, 2, 4), "dense_last": 0}, True),
    ],
    ids=str,
)
def test_a_dump_tells_presets_apart_exactly_if_they_differ(first, second, equal):
    """What is kept of a run is known by its preset's dump."""
    presets = [Preset(**first), Preset(**second)]
    assert (presets[0] == presets[1]) == equal
    assert (json.dumps(presets[0].model_dump(mode="json")) == json.dumps(presets[1].model_dump(mode="json"))) == equal
    assert [Preset(**json.loads(preset.model_dump_json())) for preset in presets] == presets


def test_a_preset_cannot_be_written():
    with pytest.raises(ValueError, match="frozen"):
        load_preset("psa-3").floor = 0.5


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [
        *[(0.25, 50, 13), (0.3, 50, 15), (0.3, 10, 3), (0.07, 100, 7), (0.1 + 0.2, 10, 3), (0.251, 4, 2)],
        *[(1 / 3, 3, 1), (0, 50, 0), (1.0, 50, 50), (1.0, 1, 1), (0.01, 1, 1), (0.25, 0, 0)],
    ],
)
def test_dense_step_count_rounds_up_but_not_for_rounding_errors(share, steps, expected):
    assert Preset(dense_steps=share).dense_step_count(steps) == expected


def test_dense_step_count_refuses_negative_steps():
    with pytest.raises(ValueError, match="num_steps=-1"):
        Preset().dense_step_count(-1)


# Rules for layers


def specs_of(*rules, num_layers=12, **preset):
    return Preset(layers=list(rules), **preset).layer_specs(num_layers)


@pytest.mark.parametrize(
    ("match", "layers"),
    [
        *[(3, {3}), ("3", {3}), ("0-1", {0, 1}), ("10-", {10, 11}), ("0,5,7-9", {0, 5, 7, 8, 9})],
        *[("3-3", {3}), (" 1 - 2 , 4 ", {1, 2, 4})],
        *[("0-", set(range(12))), ("11", {11}), ("11-", {11}), ("2,2,1-3", {1, 2, 3})],
    ],
)
def test_match_selects_layers(match, layers):
    specs = specs_of({"match": match, "dense": True})
    assert {layer for layer, spec in enumerate(specs) if spec is None} == layers


def test_later_rules_win_key_by_key():
    specs = specs_of(
        {"match": "0-", "floor": 0.1, "rest": "mean"},
        {"match": "2-4", "floor": 0.2, "dense": True},
        {"match": "4", "dense": False, "thresholds": [0.2, 0.3, 0.4]},
        thresholds=[0.1, 0.2, 0.3],
    )
    assert [spec and spec.floor for spec in specs[:6]] == [0.1, 0.1, None, None, 0.2, 0.1]
    assert specs[4].thresholds == (0.2, 0.3, 0.4) and specs[5].thresholds == (0.1, 0.2, 0.3)
    assert all(spec.rest == "mean" for spec in specs if spec)
    assert specs[0] is specs[1]


def test_a_rule_changes_every_key_of_a_layer():
    change = {
        "block": {"query": 64, "key": 32},
        "levels": [1, 8],
        "rule": "mass",
        "thresholds": [0.5, 0.9],
        "floor": 0.1,
        "importance": {"estimator": "pooled", "statistic": "mean", "query_stride": 8, "key_stride": 2},
        "similarity": [0.7],
        "rest": "mean",
        "precision": "int8_qk",
    }
    first, second = specs_of({"match": 1, **change}, num_layers=2)
    assert first == AttentionSpec()
    importance = Importance("pooled", "mean", 8, 2)
    assert second == AttentionSpec(64, 32, (1, 8), "mass", (0.5, 0.9), 0.1, (0.7,), importance, "mean", None, "int8_qk")


def test_nested_keys_and_null_are_merged():
    base = {"block": {"query": 64, "key": 128}, "importance": {"estimator": "pooled"}, "similarity": [0.7, 0.6]}
    rules = [{"match": "0-", "importance": {"key_stride": 4}}, {"match": 1, "block": {"key": 32}, "similarity": None}]
    first, second = specs_of(*rules, num_layers=2, **base)
    assert (first.block_query, first.block_key, first.similarity) == (64, 128, (0.7, 0.6))
    assert (second.block_query, second.block_key, second.similarity) == (64, 32, None)
    assert first.importance == second.importance == Importance("pooled", "max", 8, 4)


def test_rules_that_only_together_make_sense_are_judged_by_the_layers_there_are():
    preset = Preset(layers=[{"match": "1-", "levels": [1, 2]}, {"match": "1-2", "thresholds": [0.2, 0.4]}])
    assert [spec.levels for spec in preset.layer_specs(3)] == [(1, 2, 4), (1, 2), (1, 2)]
    message = message_of(lambda: preset.layer_specs(4))
    assert "layers[0].levels = [1, 2]: thresholds has length 3, levels [1, 2] needs 2" in message


def test_rules_that_clash_on_one_layer_only_name_the_later_one():
    rules = [
        {"match": "0-7", "levels": [1, 2], "thresholds": [0.2, 0.4]},
        {"match": "7-", "thresholds": [0.1, 0.2, 0.3]},
    ]
    message = message_of(lambda: Preset(layers=rules))
    assert "layers[1].thresholds = [0.1, 0.2, 0.3]" in message and "[1, 2] needs 2" in message


def test_rules_that_clash_behind_the_end_of_another_are_refused_without_a_number_of_layers():
    """Layers 5 to 8, where only the first rule applies, lack levels for it."""
    levels = {"levels": [1, 2]}
    rules = [{"match": "0-9", "thresholds": [0.2, 0.4]}, {"match": "0-4", **levels}, {"match": 9, **levels}]
    message = message_of(lambda: Preset(layers=rules))
    assert "layers[0].thresholds = [0.2, 0.4]" in message and "[1, 2, 4] needs 3" in message


@pytest.mark.parametrize("match", ["12", "12-", "3-12", "0,40", 999])
def test_a_layer_that_the_model_lacks_is_an_error(write, match):
    path = write(f"layers:\n- {{match: 0, dense: true}}\n- {{match: '{match}', floor: 0.1}}")
    preset = load_preset(path)
    message = message_of(lambda: preset.layer_specs(12))
    assert message.startswith(f"{path}: layers[1].match = '{match}': there is no layer ")
    assert "allowed: layers 0 to 11" in message and "12 layers" in message


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_layer_specs_refuses_an_impossible_number_of_layers(count):
    with pytest.raises(ValueError, match=f"num_layers={count}"):
        Preset().layer_specs(count)


# Changes in code


def test_replace_takes_nested_mappings_and_ready_made_parts():
    changes = {
        "block": {"query": 64, "key": 64},
        "importance": {"statistic": "mean"},
        "layers": [{"match": 0, "dense": True}],
    }
    changed = load_preset("psa-3").replace(**changes)
    dense, spec = changed.layer_specs(2)
    assert dense is None and (spec.block_query, spec.importance.statistic) == (64, "mean")
    assert changed.block.query == 64 and changed.layers[0].dense and changed.name == "psa-3"
    assert load_preset(changed) is changed and changed == load_preset("psa-3").model_copy(update=changes)
    inner = changed.replace(block=changed.block.model_copy(update={"key": 32}))
    assert inner.layer_specs(1) == (None,) and inner.block.key == 32
    rules = inner.replace(layers=[inner.layers[0], LayerRule(match=1, floor=0.5)], thresholds=(0.1, 0.1, 0.3))
    assert [spec and (spec.floor, spec.thresholds) for spec in rules.layer_specs(2)] == [None, (0.5, (0.1, 0.1, 0.3))]


def test_replace_leaves_the_preset_as_it_was():
    preset = load_preset(EXAMPLE)
    assert preset.replace(floor=0.5).floor == 0.5 and preset == load_preset(EXAMPLE)
    assert preset.replace() == preset == preset.model_copy() and preset.model_copy() is not preset
    assert preset.replace(floor=0.5).model_dump(exclude_unset=True) == {
        **preset.model_dump(exclude_unset=True),
        "floor": 0.5,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block": {"query": 64, "key": 65}}, "block.key = 65"),
        ({"importance": {"statistic": "median"}}, "importance.statistic = 'median'"),
        ({"levels": [1, 2, 3]}, "levels = [1, 2, 3]"),
        ({"levels": (1, 2)}, "thresholds = [0.15, 0.25, 0.45]"),
        ({"flor": 0.1}, "did you mean floor?"),
        ({"layers": [{"match": 0, "floor": 2}]}, "layers[0].floor = 2"),
        ({"floor": float("nan")}, "floor = nan: not finite"),
        ({3: 4}, "3 = 4: unknown key"),
        ({"block": {3: 4}}, "block[3] = 3"),
        ({"source": "\ud800"}, "source = "),
        ({"levels": {1, 2, 4}}, "levels = {1, 2, 4}: not a list"),
    ],
    ids=str,
)
def test_a_bad_change_is_refused_at_once(changes, expected):
    shipped = load_preset("psa-3")
    ways = [lambda preset: preset.model_copy(update=changes)]
    if all(isinstance(key, str) for key in changes):
        ways.append(lambda preset: preset.replace(**changes))
    for change in ways:
        for preset in (shipped, shipped.replace(refresh=2)):
            message = message_of(lambda change=change, preset=preset: change(preset))
            assert expected in message and "allowed: " in message
            assert message.startswith(f"{shipped_folder() / 'psa-3.yaml'} (changed in code): ")


def test_a_bad_part_is_refused_where_it_is_used():
    """What pydantic copies or constructs without a check goes no further."""
    preset = load_preset(EXAMPLE)
    block = preset.block.model_copy(update={"key": 65})
    assert "block.key = 65" in message_of(lambda: preset.replace(block=block))
    rule = LayerRule.model_construct({"match", "floor"}, match="0", floor=2)
    assert "layers[0].floor = 2" in message_of(lambda: Preset(layers=[rule]))
    assert "layers[0].flor = 2" in message_of(lambda: Preset(layers=[rule.model_copy(update={"flor": 2, "floor": 0})]))


def test_a_preset_made_in_code_is_named_in_messages():
    assert message_of(lambda: Preset(floor=2)).startswith("preset: floor = 2: out of range")
    assert message_of(lambda: Preset(name="mine").replace(floor=2)).startswith("preset 'mine': floor = 2")
    changed = Preset(name="mine").replace(layers=[{"match": 9, "floor": 0.1}])
    assert message_of(lambda: changed.layer_specs(4)).startswith("preset 'mine': layers[0].match = '9'")


def test_a_preset_is_checked_when_it_is_made_and_not_again(monkeypatch):
    made, check = [], Preset.__init__
    monkeypatch.setattr(Preset, "__init__", lambda self, /, **settings: made.append(1) or check(self, **settings))
    preset = load_preset(EXAMPLE)
    assert len(made) == 1
    preset.layer_specs(30), preset.layer_orders(30), preset.dense_step_count(50)
    assert load_preset(preset) is preset and pickle.loads(pickle.dumps(preset)) == preset and len(made) == 1
    preset.replace(floor=0.1)
    assert len(made) == 2


def test_rules_that_do_other_things_are_not_equal():
    """The rule that says a default changes a layer; the one that leaves it out does not."""
    said, unsaid = (Preset(floor=0.5, layers=[{"match": 0, **rule}]) for rule in ({"floor": 0.0}, {}))
    assert said.layer_specs(1) != unsaid.layer_specs(1) and said != unsaid
    assert said == Preset(floor=0.5, layers=[{"match": "0", "floor": 0.0}])
    assert hash(said) == hash(Preset(floor=0.5, layers=[{"match": "0", "floor": 0.0}]))
