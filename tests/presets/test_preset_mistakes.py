"""Mistakes in presets: each is told in one clear line that names the place, the key, its value and what is allowed."""

import errno
import functools
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psa_presets import Preset, PresetError, list_presets, load_preset
from psa_presets.files import MAX_BYTES, shipped_folder
from psa_testing.preset_checks import message_of, write_file


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_file, tmp_path)


MISTAKES = [
    # content, key, value as shown, part of what is allowed
    ("treshholds: [0.1, 0.2, 0.3]", "treshholds", "[0.1, 0.2, 0.3]", "did you mean thresholds?"),
    ("floor: 3\ntreshholds: [0.1]", "treshholds", "[0.1]", "did you mean thresholds?"),
    ("Levels: [1]", "Levels", "[1]", "did you mean levels?"),
    ("block: {querry: 64}", "block.querry", "64", "did you mean query?"),
    ("layers: [{match: 0, desne: true}]", "layers[0].desne", "true", "did you mean dense?"),
    ("layers: [{match: 0, refresh: 2}]", "layers[0].refresh", "2", "thresholds, density, floor"),
    ("layers: [{match: 0, order: zigzag}]", "layers[0].order", "'zigzag'", "hilbert, tiles or raster"),
    ("name: 3", "name", "3", "letters"),
    ("name: ../x", "name", "'../x'", "letters"),
    ("name: dense", "name", "'dense'", "not dense"),
    ("source: [a]", "source", "['a']", "text"),
    ("dense_steps: '0.25'", "dense_steps", "'0.25'", "from 0 to 1"),
    ("dense_steps: true", "dense_steps", "true", "from 0 to 1"),
    ("dense_steps: 1.01", "dense_steps", "1.01", "from 0 to 1"),
    ("dense_steps: -0.1", "dense_steps", "-0.1", "from 0 to 1"),
    ("dense_steps: .nan", "dense_steps", "nan", "from 0 to 1"),
    ("dense_steps: null", "dense_steps", "null", "from 0 to 1"),
    ("dense_steps: 2.0", "dense_steps", "2.0", "a whole number of steps (1, 4)"),
    ("dense_steps: -1", "dense_steps", "-1", "a whole number of steps"),
    ("dense_steps: 99999999999", "dense_steps", "99999999999", "a whole number of steps"),
    ("dense_last: 1.5", "dense_last", "1.5", "from 0 to 1"),
    ("dense_last: 'all'", "dense_last", "'all'", "from 0 to 1"),
    ("floor: .inf", "floor", "inf", "from 0 to 1"),
    ("block: 64", "block", "64", "mapping of query and key"),
    ("block: {query: 100, key: 64}", "block.query", "100", "32, 64, 128 or 256"),
    ("block: {query: 16, key: 64}", "block.query", "16", "32, 64, 128 or 256"),
    ("block: {key: 64.0}", "block.key", "64.0", "16, 32, 64, 128 or 256"),
    ("block: {key: '64'}", "block.key", "'64'", "16, 32, 64, 128 or 256"),
    ("levels: [1, 3, 4]", "levels", "[1, 3, 4]", "divide block.key"),
    ("levels: [1, 2, 128]", "levels", "[1, 2, 128]", "divide block.key"),
    ("levels: [1, 4, 2]", "levels", "[1, 4, 2]", "strictly increasing"),
    ("levels: [1, 2, 2]", "levels", "[1, 2, 2]", "strictly increasing"),
    ("levels: [0, 2, 4]", "levels[0]", "0", "positive integers"),
    ("levels: [1, 2, true]", "levels[2]", "true", "positive integers"),
    ("levels: []", "levels", "[]", "positive integers"),
    ("levels: 4", "levels", "4", "positive integers"),
    ("levels: {a: 2}", "levels", "{'a': 2}", "positive integers"),
    (f"levels: [1, 2, 0x{'f' * 4000}]", "levels[2]", "an integer of 16000 bits", "positive integers"),
    ("rule: quantile", "rule", "'quantile'", "count, mass or budget"),
    ("rule: [count]", "rule", "['count']", "count, mass or budget"),
    ("thresholds: [0.3, 0.2, 0.4]", "thresholds", "[0.3, 0.2, 0.4]", "none smaller than the one before"),
    ("thresholds: [0.1, 0.2, 1.5]", "thresholds[2]", "1.5", "from 0 to 1"),
    ("thresholds: [-0.1, 0.2, 0.5]", "thresholds[0]", "-0.1", "from 0 to 1"),
    ("thresholds: [0.1, '0.2', 0.5]", "thresholds[1]", "'0.2'", "one number from 0 to 1 per level"),
    ("thresholds: [0.1, null, 0.5]", "thresholds[1]", "null", "one number from 0 to 1 per level"),
    ("thresholds: [0, 0, 0]", "thresholds", "[0, 0, 0]", "the last above 0"),
    ("thresholds: [0.1, 0.2]", "thresholds", "[0.1, 0.2]", "one number from 0 to 1 per level"),
    ("thresholds: []", "thresholds", "[]", "one number from 0 to 1 per level"),
    ("levels: [1, 2]", "thresholds", "[0.15, 0.25, 0.45]", "one number from 0 to 1 per level"),
    ("importance: sampled", "importance", "'sampled'", "mapping of estimator"),
    ("importance: {estimator: exact}", "importance.estimator", "'exact'", "sampled or pooled"),
    ("importance: {statistic: sum}", "importance.statistic", "'sum'", "max or mean"),
    ("importance: {query_stride: 0}", "importance.query_stride", "0", "divides block.query"),
    ("importance: {query_stride: 3}", "importance.query_stride", "3", "divides block.query"),
    ("importance: {key_stride: 128}", "importance.key_stride", "128", "divides block.key"),
    ("similarity: [0.7]", "similarity", "[0.7]", "per level after the first"),
    ("similarity: [0.7, 1.1]", "similarity[1]", "1.1", "from -1 to 1"),
    ("similarity: 0.7", "similarity", "0.7", "null, or one number"),
    ("order: zigzag", "order", "'zigzag'", "hilbert, tiles or raster"),
    ("tile: [4, 4]", "tile", "[4, 4]", "three positive integers"),
    ("tile: [4, 0, 4]", "tile[1]", "0", "three positive integers"),
    ("rest: drop", "rest", "'drop'", "skip or mean"),
    ("precision: int8", "precision", "'int8'", "native or int8_qk"),
    ("refresh: 0", "refresh", "0", "a positive integer"),
    ("refresh: 99999999999", "refresh", "99999999999", "a positive integer"),
    ("correction: 1", "correction", "1", "true or false"),
    ("share_guidance: 1", "share_guidance", "1", "true or false"),
    ("share_guidance: 'true'", "share_guidance", "'true'", "true or false"),
    ("float32_on_gpu: true", "float32_on_gpu", "true", "dense or sparse"),
    ("dense_attention: fa3", "dense_attention", "'fa3'", "stock or psa"),
    ("min_tokens: -1", "min_tokens", "-1", "0 or more"),
    ("min_tokens: 2e3", "min_tokens", "'2e3'", "0 or more"),
    ("min_tokens: true", "min_tokens", "true", "auto, or an integer, 0 or more"),
    ("min_tokens: Auto", "min_tokens", "'Auto'", "auto, or an integer, 0 or more"),
    ("layers: {match: 0}", "layers", "{'match': 0}", "a list of"),
    ("layers: [3]", "layers[0]", "3", "a list of"),
    (f"layers: [{', '.join(['{match: 0}'] * 201)}]", "layers", "[{'match': 0}, ", "up to 200"),
    ("layers: [{match: all, dense: true}]", "layers[0].match", "'all'", "a range or a list"),
    ("layers: [{match: 4-2, dense: true}]", "layers[0].match", "'4-2'", "a range or a list"),
    ("layers: [{match: '1,,2', dense: true}]", "layers[0].match", "'1,,2'", "a range or a list"),
    ("layers: [{match: -1, dense: true}]", "layers[0].match", "-1", "a range or a list"),
    ("layers: [{match: 5000, dense: true}]", "layers[0].match", "5000", "up to 999"),
    ("layers: [{match: true, dense: true}]", "layers[0].match", "true", "a range or a list"),
    ("layers: [{match: 0, dense: 1}]", "layers[0].dense", "1", "true or false"),
    (
        "layers: [{match: 0}, {match: 1, thresholds: [0.2, 0.1, 0.3]}]",
        "layers[1].thresholds",
        "[0.2, 0.1, 0.3]",
        "none",
    ),
    ("layers: [{match: 0, thresholds: null}]", "layers[0].thresholds", "null", "one number from 0 to 1"),
    ("layers: [{match: 0, thresholds: [0.2]}]", "layers[0].thresholds", "[0.2]", "per level"),
    ("layers: [{match: 3, levels: [1, 2]}]", "layers[0].levels", "[1, 2]", "divide block.key"),
    ("layers: [{match: 3, levels: [1, 2, 12]}]", "layers[0].levels", "[1, 2, 12]", "divide block.key"),
    (
        "levels: [1, 2, 32]\nlayers: [{match: 3, block: {key: 16}}]",
        "layers[0].block.key",
        "16",
        "16, 32, 64, 128 or 256",
    ),
    ("layers: [{match: 3, similarity: [0.5]}]", "layers[0].similarity", "[0.5]", "per level after the first"),
    ("steps: {match: 0}", "steps", "{'match': 0}", "a list of"),
    (f"steps: [{', '.join(['{match: 0}'] * 21)}]", "steps", "[{'match': 0}, ", "up to 20"),
    ("steps: [{match: 0, desne: true}]", "steps[0].desne", "true", "did you mean dense?"),
    ("steps: [{match: 0, refresh: 2}]", "steps[0].refresh", "2", "thresholds, density, floor"),
    ("steps: [{match: 0, dense: 1}]", "steps[0].dense", "1", "true or false"),
    ("steps: [{match: 0, floor: 2}]", "steps[0].floor", "2", "from 0 to 1"),
    (
        "steps: [{match: last, dense: true}]",
        "steps[0].match",
        "'last': not a list of steps",
        "shares of the run (0-30%",
    ),
    ("steps: [{match: 4-2}]", "steps[0].match", "'4-2': 4-2 runs backwards", "a range or a list"),
    ("steps: [{match: 1.5}]", "steps[0].match", "1.5: neither text nor an integer", "a range or a list"),
    ("steps: [{match: '1.5'}]", "steps[0].match", "'1.5': not a list of steps", "a range or a list"),
    ("steps: [{match: '0-1.5'}]", "steps[0].match", "'0-1.5': not a list of steps", "a range or a list"),
    ("steps: [{match: '50%'}]", "steps[0].match", "'50%': 50% is a place in the run", "a range or a list"),
    ("steps: [{match: '0%-3'}]", "steps[0].match", "'0%-3': from a share to a number of a step", "a range or a list"),
    ("steps: [{match: '3-30%,1,%'}]", "steps[0].match", "'3-30%,1,%': not a list of steps", "a range or a list"),
    ("steps: [{match: '30-30%'}]", "steps[0].match", "'30-30%': nothing is between 30% and 30%", "a range or a list"),
    ("steps: [{match: '50-30%'}]", "steps[0].match", "'50-30%': nothing is between 50% and 30%", "a range or a list"),
    ("steps: [{match: '100%-'}]", "steps[0].match", "'100%-': nothing is between 100% and 100%", "a range or a list"),
    ("steps: [{match: '0-101%'}]", "steps[0].match", "'0-101%': a share above 100%", "a range or a list"),
    (f"steps: [{{match: '{','.join(['1'] * 21)}'}}]", "steps[0].match", "'1,1,1,", "a range or a list"),
    ("steps: [{match: -1}]", "steps[0].match", "-1: out of range", "a range or a list"),
    ("steps: [{match: 1000}]", "steps[0].match", "1000: out of range", "steps up to 999"),
    ("steps: [{match: true}]", "steps[0].match", "true: neither text nor an integer", "a range or a list"),
    ("steps: [{match: 0-50%, levels: [1, 2]}]", "steps[0].levels", "[1, 2]", "divide block.key"),
    (
        "steps: [{match: 0-50%, density: 0.4}]",
        "steps[0].density",
        "0.4: the rule count takes no",
        "with the rule budget",
    ),
    ("layers: [{match: 3, importance: {key_stride: 5}}]", "layers[0].importance.key_stride", "5", "divides block.key"),
]


@pytest.mark.parametrize(
    ("content", "key", "value", "allowed"), MISTAKES, ids=[mistake[0][:40] for mistake in MISTAKES]
)
def test_a_mistake_names_file_key_value_and_what_is_allowed(write, content, key, value, allowed):
    path = write(content)
    message = message_of(lambda: load_preset(path))
    assert message.startswith(f"{path}: {key} = {value}")
    assert "allowed: " in message and allowed in message


def test_a_rule_without_match_is_told(write):
    path = write("layers: [{match: 1}, {dense: true}]")
    message = message_of(lambda: load_preset(path))
    assert message.startswith(f"{path}: layers[1].match is missing; allowed: a layer, a range")
    path = write("steps: [{match: 1}, {dense: true}]")
    message = message_of(lambda: load_preset(path))
    assert message.startswith(f"{path}: steps[1].match is missing; allowed: a step, a range")


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BROKEN = {
    "empty": ("", "no settings"),
    "only comments": ("# nothing\n\n", "no settings"),
    "null": ("null", "no settings"),
    "empty mapping": ("{}", "no settings"),
    "list": ("[1, 2]", "[1, 2], not a mapping"),
    "text": ("psa-3", "'psa-3', not a mapping"),
    "not YAML": ("levels: [1, 2", "not valid YAML in line"),
    "tab": ("block:\n\tquery: 64", "not valid YAML in line 2"),
    "two documents": ("floor: 0\n---\nfloor: 1", "not valid YAML in line"),
    "duplicate key": ("floor: 0.1\nrest: mean\nfloor: 0.2", "line 3, column 1: the key floor is given twice"),
    "nested duplicate key": ("block: {key: 64, key: 32}", "the key key is given twice"),
    "alias": ("levels: &a [1, 2, 4]\ntile: *a", "alias *a: not allowed"),
    "alias bomb": (BOMB, "alias *a: not allowed"),
    "alias to itself": ("layers: &a [*a]", "alias *a: not allowed"),
    "merge key": ("block: {<<: {key: 64}}", "a key that is not text"),
    "number as key": ("3: 4", "a key that is not text"),
    "list as key": ("[1]: 4", "a key that is not text"),
    "python tag": ("name: !!python/object/apply:os.system ['true']", "tag !!python/object/apply:os.system"),
    "own tag": ("name: !mine x", "tag !mine"),
    "date": ("name: 2024-01-01", "tag !!timestamp"),
    "binary tag": ("name: !!binary aGVsbG8=", "tag !!binary"),
    "set": ("levels: !!set {1, 2}", "tag !!set"),
    "empty integer": ("min_tokens: !!int ''", "not valid YAML"),
    "impossible boolean": ("share_guidance: !!bool perhaps", "not valid YAML"),
    "number of 9000 digits": ("min_tokens: " + "9" * 9000, "not valid YAML"),
    "deep nesting": ("levels: " + "[" * 3000 + "]" * 3000, "more than 16 levels of nesting"),
    "deep nesting without end": ("levels: " + "[" * 60000, "more than 16 levels of nesting"),
    "deep mapping": ("block: " + "{a: " * 3000 + "1" + "}" * 3000, "more than 16 levels of nesting"),
    "not UTF-8": (b"name: \xff\xfe", "not UTF-8"),
    "zero bytes": (b"\0" * 100, "not valid YAML"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "not UTF-8"),
    "control characters": (b"name: a\x07b", "not valid YAML"),
    "too large": ("# " + "x" * MAX_BYTES, "larger than 64 KiB"),
}


@pytest.mark.parametrize(("content", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(write, content, expected):
    path = write(content)
    message = message_of(lambda: load_preset(path))
    assert message.startswith(f"{path}: ") and expected in message and "allowed" in message


def test_a_windows_file_with_a_byte_order_mark_is_read(write):
    assert load_preset(write(b"\xef\xbb\xbffloor: 0.5\r\nrest: mean\r\n")).floor == 0.5


@pytest.mark.parametrize("wanted", [Path("psa3.yaml"), "psa3.yaml", "psa3.yml", "./psa3", "sub/psa3", "psa3"], ids=repr)
def test_a_file_that_is_not_there(tmp_path, monkeypatch, wanted):
    monkeypatch.chdir(tmp_path)
    message = message_of(lambda: load_preset(wanted))
    assert "psa3" in message and "no such file (did you mean psa-3?)" in message
    assert all(name in message for name in list_presets())


@pytest.mark.parametrize(
    "wanted", ["", "a\0b", "a\0b.yaml", "x" * 5000, "x" * 5000 + ".yaml", "\ud800.yaml", "a\nb"], ids=repr
)
def test_an_impossible_name_is_no_such_file(wanted):
    assert "no such file" in message_of(lambda: load_preset(wanted))


@pytest.mark.parametrize("wanted", [None, 3, {"name": "psa-3"}, ["psa-3"], b"psa-3"], ids=repr)
def test_something_else_than_a_name_is_refused(wanted):
    assert "allowed: a name, a path or a Preset" in message_of(lambda: load_preset(wanted))


def test_a_folder_is_refused(tmp_path):
    assert message_of(lambda: load_preset(tmp_path)).startswith(f"{tmp_path}: a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "not a regular file" in message_of(lambda: load_preset(tmp_path / "pipe.yaml"))


def test_a_file_without_permission(write, monkeypatch):
    """Refused by hand, for root reads every file."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = write("floor: 0")
    monkeypatch.setattr(Path, "open", refuse)
    assert f"{path}: cannot be read (Permission denied)" in message_of(lambda: load_preset(path))


TEXTS = [path.read_text() for path in sorted(shipped_folder().glob("*.yaml"))]
SNIPPETS = [
    "*a",
    "&a",
    "!!",
    "!!int ",
    "<<: ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "\n",
    "|",
    ">",
    "'",
    '"',
    "\\ud800",
    "0x",
]
SNIPPETS += [
    "1e999",
    ".nan",
    "-",
    "null",
    "~",
    "? ",
    "%",
    "@",
    "\t",
    "\0",
    "é",
    "9" * 5000,
    "match: 0",
    "layers:",
    "---",
]


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_presets_load_or_raise_preset_error(tmp_path, data):
    text = data.draw(st.sampled_from(TEXTS))
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    text = "".join(lines)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        insert = data.draw(
            st.sampled_from(SNIPPETS) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)
        )
        text = text[:start] + insert + text[end:]
    path = Path(tmp_path) / "mutated.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        load_preset(path).layer_specs(30)
    except PresetError as error:
        assert str(error).isprintable() and str(error).startswith(str(path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(key=st.sampled_from(sorted(Preset.model_fields)), value=VALUES, rules=st.sampled_from(["", "layers", "steps"]))
def test_any_value_in_code_is_taken_or_refused(key, value, rules):
    update = {rules: [{"match": 0, key: value}]} if rules else {key: value}
    try:
        load_preset("psa-3").replace(**update).layer_specs(30)
    except PresetError as error:
        assert str(error).isprintable() and "allowed: " in str(error)
