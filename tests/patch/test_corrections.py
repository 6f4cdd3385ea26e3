"""What sparse attention left out at the last dense step is added to later outputs, as far as it still holds."""

from __future__ import annotations

import warnings

import pytest
import torch

from psa_diffusers import apply_psa
from psa_diffusers.patch import corrections
from psa_diffusers.patch.corrections import Corrections
from psa_diffusers.patch.dense_reasons import Fallbacks, PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.list_cache import Moment
from psa_kernels.correction.reference import left_out
from psa_testing.expectations import assert_equal_to_rounding
from psa_testing.tiny_families import CASES, EVERYTHING, ONE_EACH, preset
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

PRESET = preset(dense_steps=1, correction=True)


@pytest.fixture
def added(monkeypatch):
    """How far each sparse output was from dense attention, before and after a correction: sums of squares."""
    seen = []
    original = Corrections.add

    def add(self, layer, moment, fits, sparse, dense_rows, steps):
        dense, before = dense_rows(torch.arange(sparse.shape[1])), sparse.clone()
        original(self, layer, moment, fits, sparse, dense_rows, steps)
        seen.append((float((before - dense).square().sum()), float((sparse - dense).square().sum())))

    monkeypatch.setattr(Corrections, "add", add)
    return seen


def run(pipe, **overrides):
    return run_small(pipe, **{"output_type": "latent", "num_inference_steps": 3, **overrides})


@pytest.mark.parametrize("name", ONE_EACH)
def test_outputs_come_closer_to_dense_attention(name, added):
    """Were tokens mixed up, nothing would hold."""
    case = CASES[name]
    pipe = case.make()
    with apply_psa(pipe, PRESET, strict=True) as psa:
        case.run(pipe, num_inference_steps=3)
        assert psa.stats().fallbacks == {}
    assert added
    before, after = (sum(errors) for errors in zip(*added, strict=True))
    assert after < 0.97 * before


@pytest.mark.parametrize("changes", [{}, {"share_guidance": True, "refresh": 2}], ids=["own-lists", "shared-lists"])
def test_each_guidance_branch_has_its_own(changes, added, monkeypatch):
    pipe, places = tiny_wan(), []
    original = Corrections.keep

    def keep(self, layer, moment, *rest):
        places.append((layer.name, moment.step, moment.branch))
        original(self, layer, moment, *rest)

    monkeypatch.setattr(Corrections, "keep", keep)
    with apply_psa(pipe, PRESET.replace(**changes), strict=True) as psa:
        run(pipe)
        kept = psa.processor._runs._run.corrections._kept
    layers = len(pipe.transformer.blocks)
    assert sorted(places) == sorted((f"blocks.{i}", 0, branch) for i in range(layers) for branch in (0, 1))
    assert len(added) == layers * 2 * 2
    assert not kept  # what follows the run may need the memory


def test_how_much_holds_is_told_now_and_then(monkeypatch):
    pipe, told = tiny_wan(), []
    original = corrections.correction_weights
    monkeypatch.setattr(corrections, "TELLINGS", 3)
    monkeypatch.setattr(corrections, "correction_weights", lambda *x: told.append(1) or original(*x))
    with apply_psa(pipe, PRESET, strict=True):
        run(pipe, num_inference_steps=6)
    # At the steps 1, 3 and 5 of 0 to 5.
    assert len(told) == len(pipe.transformer.blocks) * 2 * 3


def test_the_dense_phase_stays_dense_and_keeping_everything_changes_nothing():
    pipe = tiny_wan()
    stock = run(pipe)
    with apply_psa(pipe, EVERYTHING.replace(dense_steps=1, correction=True), strict=True) as psa:
        assert_equal_to_rounding(run(pipe), stock)
        assert psa.stats().dense_at == [0]
    with apply_psa(pipe, PRESET.replace(dense_steps=3), strict=True):
        assert torch.equal(run(pipe), stock)


def test_runs_repeat_and_are_undone():
    pipe = tiny_wan()
    stock = run(pipe)
    with apply_psa(pipe, PRESET, strict=True):
        first = run(pipe)
        assert torch.equal(run(pipe), first)
    assert torch.equal(run(pipe), stock)
    with apply_psa(pipe, PRESET.replace(correction=False), strict=True):
        assert not torch.equal(run(pipe), first)


def test_a_run_without_a_dense_phase_has_none(added):
    pipe = tiny_wan()
    with apply_psa(pipe, PRESET.replace(dense_steps=0), strict=True):
        corrected = run(pipe)
    with apply_psa(pipe, PRESET.replace(dense_steps=0, correction=False), strict=True):
        assert torch.equal(run(pipe), corrected)
    assert all(before == after for before, after in added)


def test_layers_that_are_dense_keep_none(added):
    pipe = tiny_wan()
    chosen = PRESET.replace(layers=[{"match": "0", "dense": True}])
    with apply_psa(pipe, chosen, strict=True):
        run(pipe)
    assert len(added) == (len(pipe.transformer.blocks) - 1) * 2 * 2


def test_without_room_there_are_none_and_one_line_says_so(monkeypatch):
    pipe = tiny_wan()
    monkeypatch.setattr(corrections, "free_bytes", lambda device: 1000)
    with apply_psa(pipe, PRESET.replace(correction=False)):
        plain = run(pipe)
    with warnings.catch_warnings(record=True) as seen, apply_psa(pipe, PRESET):
        warnings.simplefilter("always", PSAFallbackWarning)
        assert torch.equal(run(pipe), plain)
    told = [str(each.message) for each in seen if each.category is PSAFallbackWarning]
    assert len(told) == 1 and told[0].startswith("correction: true has no effect: it would take 0.0 GiB on cpu")
    with pytest.raises(PSAFallbackError, match="correction: true has no effect"), apply_psa(pipe, PRESET, strict=True):
        run(pipe)


def test_room_is_asked_for_what_corrections_take(monkeypatch):
    output, moment = torch.randn(2, 50, 3, 5), Moment(0, 0, 0)
    kept = left_out(output, -output)
    need = 3 * (kept.pairs.nbytes + kept.units.nbytes)
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(corrections, "free_bytes", lambda device, free=free: free)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PSAFallbackWarning)
            assert Corrections().has_room(moment, output, 3, Fallbacks(strict=False)) is fits


def test_compiled_blocks_add_the_same(added):
    pipe = tiny_wan()
    with apply_psa(pipe, PRESET, strict=True):
        eager = run(pipe)
        for block in pipe.transformer.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert_equal_to_rounding(run(pipe), eager)
    assert len(added) == 2 * len(pipe.transformer.blocks) * 2 * 2
