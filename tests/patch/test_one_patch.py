"""A transformer has one patch at a time: the next one replaces it, copies are refused, and nothing is left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch

from psa_diffusers import PSAProcessor, apply_psa, disable_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.sites import ATTRIBUTE
from psa_testing.tiny_families import CASES, preset
from psa_testing.tiny_families.cases import GUIDED, SMALL_TEXT, Case
from psa_testing.tiny_pipelines import tiny_transformer, tiny_wan
from psa_testing.wan_latents import run

pytestmark = pytest.mark.usefixtures("one_thread")

HALF = {"dense_steps": 0.5}


def traces(transformer):
    """All that a patch leaves on a transformer's modules."""
    found = {}
    for name, module in transformer.named_modules():
        hooks = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        found[name] = (
            [len(kind) for kind in hooks],
            getattr(module, "processor", None),
            ATTRIBUTE in vars(module),
            "forward" in vars(module),
        )
    return found


def test_making_one_changes_nothing():
    pipe = tiny_wan(two_stage=True)
    before = traces(pipe.transformer), traces(pipe.transformer_2)
    stock = run(pipe)
    kept = [PSAProcessor(pipe, preset()) for _ in range(3)]
    assert torch.equal(run(pipe), stock)
    assert kept[0].stats().steps == 0
    for processor in kept:
        processor.restore()
    assert (traces(pipe.transformer), traces(pipe.transformer_2)) == before


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize("way", ["set_attn_processor", "apply_psa"])
def test_ten_of_them_and_one_restore(way, runs):
    pipe = tiny_wan()
    before = traces(pipe.transformer)
    stock = run(pipe)
    for _ in range(10):
        if way == "apply_psa":
            psa = apply_psa(pipe, preset())
        else:
            psa = PSAProcessor(pipe, preset())
            pipe.transformer.set_attn_processor(psa)
        if runs:
            run(pipe, num_inference_steps=2)
    psa.restore()
    assert traces(pipe.transformer) == before
    assert torch.equal(run(pipe), stock)


def test_the_one_that_was_replaced_is_out_of_it():
    pipe = tiny_wan()
    first = PSAProcessor(pipe, preset())
    pipe.transformer.set_attn_processor(first)
    run(pipe)
    second = PSAProcessor(pipe, preset(**HALF), strict=True)
    pipe.transformer.set_attn_processor(second)
    expected = run(pipe)
    assert (second.stats().dense_steps, second.stats().run, first.stats().run) == (2, 1, 1)
    first.restore()
    assert all(each is second for each in pipe.transformer.attn_processors.values())
    assert torch.equal(run(pipe), expected) and second.stats().run == 2
    with apply_psa(tiny_wan(), preset(**HALF)) as psa:
        assert torch.equal(run(tiny_wan()), run(tiny_wan())) and psa is not None
    second.restore()
    pipe.transformer.set_attn_processor(first)  # it may come back
    run(pipe)
    assert first.stats().run == 2 and first.stats().dense_steps == 1


def test_one_for_each_layer_is_told_what_is_wrong():
    """As scripts for other processors do it: `{name: Processor() for name in transformer.attn_processors}`."""
    pipe = tiny_wan(num_layers=2)
    stock = run(pipe)

    def several(**settings):
        own = dict(pipe.transformer.attn_processors)
        layers = [name for name in own if ".attn1." in name]
        pipe.transformer.set_attn_processor(own | {name: PSAProcessor(pipe, preset(), **settings) for name in layers})

    several()
    with pytest.warns(PSAFallbackWarning, match="several PSAProcessors, but one serves all layers; set the same one"):
        assert torch.equal(run(pipe), stock)
    disable_psa(pipe)
    several(strict=True)
    with pytest.raises(PSAFallbackError, match="several PSAProcessors"):
        run(pipe)
    disable_psa(pipe)
    several()
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    with pytest.raises(RuntimeError, match="several PSAProcessors"):
        run(pipe)


def test_a_replaced_patch_is_not_kept_alive():
    pipe = tiny_wan()
    first = apply_psa(pipe, preset(refresh=2))
    run(pipe)
    gone = weakref.ref(first.processor)
    second = apply_psa(pipe, preset()).processor
    del first
    gc.collect()
    assert gone() is None
    second.restore()


@pytest.mark.parametrize("compiled", ["blocks", "whole"])
def test_set_attn_processor_on_what_is_compiled(compiled):
    """Nothing tells a processor that it was set but the first trace; a second one finds the first one's graphs."""
    expected = {}
    for steps in (0.0, 0.5):
        pipe = tiny_wan()
        with apply_psa(pipe, preset(dense_steps=steps), strict=True) as psa:
            expected[steps] = run(pipe), psa.stats()
    torch._dynamo.reset()
    pipe = tiny_wan()
    stock = run(pipe)
    if compiled == "blocks":
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    else:
        pipe.transformer.compile(backend="eager")
    for steps in (0.0, 0.5, 0.0):
        processor = PSAProcessor(pipe, preset(dense_steps=steps), strict=True)
        pipe.transformer.set_attn_processor(processor)
        torch.testing.assert_close(run(pipe), expected[steps][0], rtol=0, atol=2e-5)
        assert processor.stats() == expected[steps][1]
    processor.restore()
    torch.testing.assert_close(run(pipe), stock, rtol=0, atol=2e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("state", ["set", "applied", "run", "cogvideox-5b", "mochi"])
def test_copies_are_not_patched(state, monkeypatch):
    """As those of quantisers, averages of weights, and `copy.deepcopy` are made."""
    case = CASES.get(state, Case(tiny_wan, {**GUIDED, **SMALL_TEXT}))
    pipe = case.make()
    stock = case.run(pipe)
    psa = PSAProcessor(pipe, preset(), strict=True)
    if state == "set":
        pipe.transformer.set_attn_processor(psa)
    else:
        psa.install()
    if state == "run":
        case.run(pipe)
    twin, whole = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe)
    expected = case.run(pipe)
    stats = psa.stats()
    assert not torch.equal(expected, stock) and stats.density_sparse < 0.5
    other = type(pipe)(**{**pipe.components, "transformer": twin})
    other.set_progress_bar_config(disable=True)
    for each in (other, whole):
        with pytest.warns(PSAFallbackWarning, match="this transformer is a copy of a patched one") as caught:
            assert torch.equal(case.run(each), stock)
            assert torch.equal(case.run(each), stock)
        assert len([w for w in caught if w.category is PSAFallbackWarning]) == 1
    assert psa.stats().density == stats.density
    with apply_psa(whole, preset(), strict=True) as patched, warnings.catch_warnings():
        warnings.simplefilter("error", PSAFallbackWarning)
        assert torch.equal(case.run(whole), expected)
        assert patched.stats().density_sparse == stats.density_sparse
        assert torch.equal(case.run(pipe), expected), "the original goes on as before"
    psa.restore()
    assert torch.equal(case.run(pipe), stock)


def test_a_quantised_copy_runs():
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pipe.transformer = torch.ao.quantization.quantize_dynamic(pipe.transformer, {torch.nn.Embedding})
        with pytest.warns(PSAFallbackWarning, match="this transformer is a copy of a patched one"):
            run(pipe)
    with apply_psa(pipe, preset(), strict=True) as psa:
        run(pipe)
        assert psa.stats().density_sparse < 0.5


@pytest.mark.parametrize("state", ["set", "applied"])
def test_pickling_is_refused_in_one_line(state):
    pipe = tiny_wan(num_layers=2)
    psa = PSAProcessor(pipe, preset())
    if state == "set":
        pipe.transformer.set_attn_processor(psa)
    else:
        psa.install()
    refusal = r"^a transformer patched with PSAProcessor cannot be pickled; call restore\(\) first[^\n]*$"
    for pickling in (
        lambda: pickle.dumps(pipe.transformer),
        lambda: torch.save(pipe.transformer, io.BytesIO()),
        lambda: copy.copy(psa),
    ):
        with pytest.raises(TypeError, match=refusal):
            pickling()
    assert set(pipe.transformer.state_dict()) == set(tiny_wan(num_layers=2).transformer.state_dict())
    psa.restore()
    stock = run(pipe)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(run(pipe), stock)
    with apply_psa(pipe, preset(), strict=True) as psa:
        run(pipe)
        assert psa.stats().density_sparse < 0.5


def test_one_transformer_by_two_names():
    pipe = tiny_wan(two_stage=True)
    pipe.transformer_2 = pipe.transformer
    stock = run(pipe, num_inference_steps=6)
    with apply_psa(pipe, preset(**HALF), strict=True) as psa:
        run(pipe, num_inference_steps=6)
    stats = psa.stats()
    assert stats.layers == [f"blocks.{index}" for index in range(4)] and (stats.steps, stats.dense_steps) == (6, 3)
    assert all(row == [1.0] * 4 for row in stats.density[:3])
    assert all(value < 0.6 for row in stats.density[3:] for value in row)
    assert torch.equal(run(pipe, num_inference_steps=6), stock)
    with pytest.raises(ValueError, match="has no second transformer here"):
        apply_psa(pipe, preset(), preset_2=preset())


@pytest.mark.parametrize("name", ["mochi", "allegro"])
def test_models_without_set_attn_processor(name):
    case, pipe = CASES[name], CASES[name].make()
    before = traces(pipe.transformer)
    first = apply_psa(pipe, preset(), strict=True)
    case.run(pipe)
    with apply_psa(pipe, preset(**HALF), strict=True):
        first.restore()
        case.run(pipe)
    assert traces(pipe.transformer) == before


def test_stats_are_of_the_pipeline_s_last_run():
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset(), strict=True) as psa:
        run(pipe)
        assert (psa.stats().run, psa.stats().steps, psa.stats().missed) == (1, 4, None)
        finished = psa.stats()
        pipe.transformer = tiny_transformer(num_layers=2)
        run(pipe, num_inference_steps=8)
        stats = psa.stats()
    assert stats.steps == 8 and "a run of 8 steps since with another transformer, which is not patched" in stats.missed
    assert stats.density == [[None, None]] * 8 and stats.density_sparse is None and stats.implementation is None
    assert finished.density_sparse < 0.5
    assert psa.stats() == finished  # after restore() it is of the last run that was patched


def test_a_scheduler_without_a_step_index_tells_as_well():
    case = CASES["cogvideox-2b"]
    pipe, other = case.make(), case.make()
    with apply_psa(pipe, preset(), strict=True) as psa:
        case.run(pipe)
        assert psa.stats().missed is None and psa.stats().density_sparse < 0.6
        pipe.transformer = other.transformer
        case.run(pipe)
        assert psa.stats().missed is not None and psa.stats().density_sparse is None


@pytest.mark.parametrize("call", ["forward", "__call__"])
def test_a_bare_forward_adds_nothing_to_a_finished_run(call):
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset()) as psa, torch.no_grad():
        run(pipe)
        before = psa.stats()
        text, _ = pipe.encode_prompt("a", "b", max_sequence_length=16)
        with pytest.warns(PSAFallbackWarning, match="the denoising step is unknown"):
            getattr(pipe.transformer, call)(torch.randn(1, 16, 3, 24, 24), torch.tensor([5]), text)
        after = psa.stats()
    assert (after.steps, after.density, after.coverage) == (before.steps, before.density, before.coverage)
    assert (after.density_run, after.density_sparse) == (before.density_run, before.density_sparse)
    assert list(after.fallbacks.values()) == [2] and before.fallbacks == {}


def windows(pipe, steps, shift=0):
    """A loop over windows of a long video, two guidance branches each."""
    pipe.scheduler.set_timesteps(steps)
    texts = pipe.encode_prompt("a", "b", max_sequence_length=16)
    x = torch.randn(1, 16, 9, 16, 16, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(pipe.scheduler.timesteps):
        out = torch.zeros_like(x)
        for first in (0, 3, 6):
            frames = [(first + frame + shift * index) % 9 for frame in range(3)]
            noise = [pipe.transformer(x[:, :, frames], t.expand(1), text, return_dict=False)[0] for text in texts]
            out[:, :, frames] = noise[1] + 5 * (noise[0] - noise[1])
        x = pipe.scheduler.step(out, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("changes", "selections"),
    [
        ({"share_guidance": True}, 3 * 3 * 2),
        ({"refresh": 3}, 3 * 3 * 2 * 2),
        ({"refresh": 3, "share_guidance": True}, 3 * 3 * 2),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::psa_diffusers.PSAFallbackWarning")
@torch.no_grad()
def test_windows_of_a_long_video_do_not_use_each_other_s_lists(changes, selections, shift, monkeypatch):
    """Three steps, three windows, two layers; what two guidance branches share is right for both."""
    from psa_testing.spies import count_selections

    made = count_selections(monkeypatch)
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset(dense_steps=0.0, **changes)) as psa:
        together = windows(pipe, 3, shift)
        assert len(made) == selections
        assert psa.stats().density_sparse < 0.5 and psa.stats().fallbacks == {}
        if "share_guidance" not in changes:
            with apply_psa(pipe, preset(dense_steps=0.0), strict=True):
                assert torch.equal(windows(pipe, 3, shift), together)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"refresh": 2}, "refresh: 2"),
        ({"correction": True}, "correction: true"),
        ({"correction": True, "refresh": 4, "share_guidance": True}, "correction: true, refresh: 4"),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_windows_make_ineffective_is_told(changes, named):
    pipe = tiny_wan(num_layers=1)
    line = f"{named}: no effect in a loop over windows"
    with apply_psa(pipe, preset(**changes)), pytest.warns(PSAFallbackWarning) as told:
        windows(pipe, 3)
    assert [str(each.message).startswith(line) for each in told] == [True]
    with apply_psa(pipe, preset(**changes), strict=True), pytest.raises(PSAFallbackError, match=f"strict: {line}"):
        windows(pipe, 3)
    with apply_psa(pipe, preset(share_guidance=True), strict=True):
        windows(pipe, 3)
