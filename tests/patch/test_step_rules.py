"""Runs of few steps: dense ones at both ends, rules for steps, and what is told of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.masks import MaskRecorder, middle_sparse_step
from psa_testing.spies import count_selections
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"thresholds": [0.1, 0.1, 0.1]}  # one of 3 key blocks
MOST = {"thresholds": [0.6, 0.6, 0.6]}  # two of them


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan()


def run(pipe, **overrides):
    return run_small(pipe, **{"output_type": "latent", "guidance_scale": 1.0, **overrides})


def each_forward(pipe, action):
    """From now on, what each forward of the transformer is given, and what it gives."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output[0].clone())), with_kwargs=True
    )
    action()
    hook.remove()
    return seen


def outputs(pipe, seen):
    """What the transformer gives now for the same inputs."""
    with torch.no_grad():
        return [pipe.transformer(**kwargs)[0] for kwargs, _ in seen]


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"dense_steps": 1}, {0}),
        ({"dense_steps": 0, "dense_last": 1}, {3}),
        ({"dense_steps": 1, "dense_last": 0.5}, {0, 2, 3}),
        ({"dense_steps": 0, "steps": [{"match": "1", "dense": True}]}, {1}),
        ({"dense_steps": 1, "steps": [{"match": "0-30%,75%-", "dense": True}]}, {0, 1, 3}),
        ({"dense_steps": 1, "steps": [{"match": "0-", "dense": False}]}, {0}),
    ],
    ids=str,
)
def test_dense_steps_are_those_of_stock_and_no_others(changes, dense, pipe):
    with apply_psa(pipe, preset(**changes), strict=True) as psa:
        seen = each_forward(pipe, lambda: run(pipe))
    stats = psa.stats()
    assert [torch.equal(now, then) for now, (_, then) in zip(outputs(pipe, seen), seen, strict=True)] == [
        step in dense for step in range(4)
    ]
    assert stats.dense_at == sorted(dense)
    assert [set(row) == {1.0} for row in stats.density] == [step in dense for step in range(4)]
    chosen = preset(**changes)
    assert (stats.dense_steps, stats.dense_last) == (chosen.dense_step_count(4), chosen.dense_last_count(4))


def test_each_step_computes_what_its_rules_say(pipe):
    """Step by step what presets compute that say the same for the whole run, for the same inputs."""
    base = preset(dense_steps=0, layers=[{"match": 1, "dense": True}, {"match": 2, **MOST}])
    rules = [
        {"match": "0-50%", **MOST},
        {"match": 1, "order": "raster", "block": {"key": 32}},
        {"match": "75%-", "dense": False, **FEW},
    ]
    with apply_psa(pipe, base.replace(steps=rules), strict=True) as psa:
        seen = each_forward(pipe, lambda: run(pipe))
        first = psa.stats()
        run(pipe)
        assert psa.stats() == first
    timesteps = [float(kwargs["timestep"].max()) for kwargs, _ in seen]
    densities = []
    for step, applying in enumerate((rules[:1], rules[:2], [], rules[2:])):
        alike = base.replace(layers=[*base.layers, *({**rule, "match": "0-"} for rule in applying)])
        with apply_psa(pipe, alike, strict=True) as psa, psa.run(timesteps):
            again = outputs(pipe, seen)
            assert torch.equal(again[step], seen[step][1]), step
        densities.append(psa.stats().density[step])
    assert first.density == densities and len({tuple(row) for row in densities}) == 4
    assert [row[1] == 1 for row in densities] == [True, True, True, False]


def test_steps_are_those_of_the_run_however_long_it_is(pipe):
    with apply_psa(pipe, preset(dense_steps=1, steps=[{"match": "0-50%", **MOST}, {"match": "50%-", **FEW}])) as psa:
        for steps, most in ((3, [1]), (4, [1]), (8, [1, 2, 3])):
            run(pipe, num_inference_steps=steps)
            rows = [row[0] for row in psa.stats().density]
            few = min(rows)
            assert rows[0] == 1 and [step for step, value in enumerate(rows) if few < value < 1] == most
            assert rows.count(few) == steps - 1 - len(most)


def test_two_experts_have_rules_of_their_own():
    pipe = tiny_wan(two_stage=True)
    first = preset(dense_steps=0, steps=[{"match": "0", "dense": True}])
    second = preset(dense_steps=0, dense_last=1)
    with apply_psa(pipe, first, preset_2=second, strict=True) as psa:
        run(pipe, num_inference_steps=6)
    stats = psa.stats()
    assert stats.dense_at == [0, 5] and (stats.dense_steps, stats.dense_last) == (0, 0)


# Lists that are kept


@pytest.mark.parametrize(
    ("rules", "selections"),
    [
        ([], 1),
        ([{"match": "0-50%", "dense": False}], 1),  # says nothing new
        ([{"match": "0-50%", "rest": "mean"}], 2),
        ([{"match": "0-50%", "thresholds": [0.1, 0.2, 0.7]}], 2),
        ([{"match": "0-50%", "order": "raster"}], 2),
        ([{"match": "0-50%", "block": {"key": 32}}], 2),
        ([{"match": 1, **FEW}], 3),  # those made before it were made in another way, and are gone
        ([{"match": 1, "dense": True}], 1),  # lists outlive a dense step
    ],
    ids=str,
)
def test_lists_serve_no_step_that_chooses_otherwise(rules, selections, monkeypatch, pipe):
    made = count_selections(monkeypatch)
    with apply_psa(pipe, preset(dense_steps=0, refresh=4, steps=rules), strict=True):
        kept = run(pipe)
        assert len(made) == selections * 4
        assert torch.equal(run(pipe), kept)


def test_both_guidance_branches_share_lists_of_one_step(monkeypatch, pipe):
    made = count_selections(monkeypatch)
    rules = [{"match": "50%-", "order": "raster", **FEW}]
    with apply_psa(pipe, preset(dense_steps=1, share_guidance=True, steps=rules), strict=True):
        run(pipe, guidance_scale=6.0)
    assert len(made) == 3 * 4


# What is told


@pytest.mark.parametrize(
    ("changes", "steps", "told"),
    [
        ({}, 1, r"a run of length 1 has no sparse step with the preset psa-3 \(dense_steps 0\.25, dense_last 0\)"),
        ({"dense_steps": 5}, 4, r"a run of length 4 has no sparse step with the preset psa-3 \(dense_steps 5, "),
        ({"dense_steps": 1, "dense_last": 1}, 2, r"length 2 .*\(dense_steps 1, dense_last 1\)"),
        ({"steps": [{"match": "1-3", "dense": True}]}, 4, r"length 4 .*, dense_last 0, and rules for steps\)"),
    ],
    ids=str,
)
def test_a_run_without_a_sparse_step_is_told_of_once(changes, steps, told, pipe):
    """Not even with `strict` is it an error: the preset says so."""
    stock = run(pipe, num_inference_steps=steps)
    with apply_psa(pipe, preset(**changes), strict=True) as psa:
        with pytest.warns(PSAFallbackWarning, match=told) as caught:
            assert torch.equal(run(pipe, num_inference_steps=steps), stock)
            run(pipe, num_inference_steps=steps)
        assert len([each for each in caught if each.category is PSAFallbackWarning]) == 1
        assert psa.stats().dense_at == list(range(steps)) and psa.stats().fallbacks == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSAFallbackWarning)
            run(pipe, num_inference_steps=8)
        assert psa.stats().density_sparse is not None


@pytest.mark.parametrize(
    "changes", [{"dense_steps": 1.0}, {"dense_last": 1.0}, {"steps": [{"match": "0-", "dense": True}]}], ids=str
)
def test_a_preset_that_is_never_sparse_is_no_surprise(changes, pipe):
    stock = run(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PSAFallbackWarning)
        with apply_psa(pipe, preset(**changes)):
            assert torch.equal(run(pipe), stock)


class Mine(WanAttnProcessor):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([], False),
        ([{"match": "50%-", "dense": False}], True),
        ([{"match": "0-", "dense": True}, {"match": 3, "dense": False}], True),
        ([{"match": "0-", "dense": True}], False),
    ],
    ids=str,
)
def test_a_layer_that_a_rule_for_steps_makes_sparse_may_not_be_somebody_else_s(rules, told):
    pipe = tiny_wan()
    pipe.transformer.blocks[1].attn1.set_processor(Mine())
    processor = PSAProcessor(pipe, preset(layers=[{"match": 1, "dense": True}], steps=rules), strict=True)
    if not told:
        processor.install()
        processor.restore()
        return
    with pytest.raises(PSAFallbackError, match=r"blocks\.1: .*Mine"):
        processor.install()


def test_masks_are_those_of_the_step(pipe):
    chosen = preset(
        dense_steps=1, dense_last=1, steps=[{"match": "2-4", "block": {"key": 32}}, {"match": 3, "dense": True}]
    )
    assert [middle_sparse_step(chosen, steps) for steps in (8, 6, 1)] == [4, 2, 1]
    with apply_psa(pipe, chosen, strict=True) as psa:
        recorders = [MaskRecorder(psa.stats().layers), MaskRecorder(psa.stats().layers, step=1)]
        found = []
        for recorder in recorders:
            psa.processor.record_masks(recorder)
            run(pipe, num_inference_steps=8)
            found.append({(mask.step, mask.spec.block_key, mask.levels.shape[-1]) for mask in recorder.masks()})
    assert found == [{(4, 32, 2)}, {(1, 16, 3)}]
