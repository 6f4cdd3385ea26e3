"""Steps are those of the run that is going on, whatever its guidance, experts, skipped timesteps or pipeline."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline, WanVideoToVideoPipeline

from psa_diffusers import PSAProcessor, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.families.cogvideox import tiny_cogvideox_2b
from psa_testing.tiny_families import EVERYTHING, preset
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_image, tiny_wan, tiny_wan_expanded, tiny_wan_i2v, tiny_wan_v2v

pytestmark = pytest.mark.usefixtures("one_thread")


def run(pipe, **overrides):
    """Latents rather than frames: the VAE has no part in what is tested, and takes most of the time."""
    return run_small(pipe, **{"output_type": "latent", **overrides})


class Log:
    """Writes down what each forward of a patched pipeline belongs to."""

    def __init__(self, pipe):
        self.seen = []
        self.psa = apply_psa(pipe, preset(dense_steps=1.0), strict=True)
        for patch in self.psa.processor._patches:
            patch.transformer().register_forward_pre_hook(
                lambda *_, patch=patch: self.seen.append((patch.name, patch.forward))
            )

    def steps(self, name=None):
        return [at.step for which, at in self.seen if name in (None, which)]


def test_each_step_has_one_forward_a_guidance_branch():
    pipe = tiny_wan()
    log = Log(pipe)
    run(pipe)
    assert log.steps() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [at.branch for _, at in log.seen] == [0, 1] * 4
    assert {(at.run.steps, at.grid, at.run.number) for _, at in log.seen} == {(4, (3, 4, 4), 1)}


def test_without_guidance_a_step_is_one_forward():
    pipe = tiny_wan()
    log = Log(pipe)
    run(pipe, guidance_scale=1.0)
    assert log.steps() == [0, 1, 2, 3] and {at.branch for _, at in log.seen} == {0}


def test_two_experts_count_the_steps_of_the_whole_run():
    pipe = tiny_wan(two_stage=True)
    log = Log(pipe)
    run(pipe, num_inference_steps=6, guidance_scale=1.0)
    first, second = log.steps("transformer"), log.steps("transformer_2")
    assert first and second and first + second == [0, 1, 2, 3, 4, 5]
    assert {at.branch for _, at in log.seen} == {0}


V2V = {
    "prompt": "a",
    "video": [tiny_image()] * 9,
    "guidance_scale": 1.0,
    "height": 64,
    "width": 64,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def test_video_to_video_counts_the_steps_that_it_does():
    pipe = tiny_wan_v2v()
    log = Log(pipe)
    for strength, steps in ((0.6, 6), (1.0, 10), (0.3, 3)):
        log.seen.clear()
        pipe(**V2V, strength=strength, num_inference_steps=10)
        assert log.steps() == list(range(steps)) and {at.run.steps for _, at in log.seen} == {steps}


@pytest.mark.parametrize("make", [tiny_wan_expanded, tiny_wan_i2v])
def test_timesteps_per_token_and_image_conditions(make):
    pipe = make()
    log = Log(pipe)
    run(pipe, **({"image": tiny_image()} if make is tiny_wan_i2v else {}))
    assert log.steps() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("steps", [1, 3])
def test_every_call_is_a_new_run_also_after_an_aborted_one(steps):
    pipe = tiny_wan()
    log = Log(pipe)
    run(pipe, num_inference_steps=steps)

    def abort(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, num_inference_steps=steps, callback_on_step_end=abort)
    run(pipe, num_inference_steps=steps, height=96)
    runs = {number: [at for _, at in log.seen if at.run.number == number] for number in (1, 2, 3)}
    assert (
        [at.step for at in runs[1]] == [step for step in range(steps) for _ in range(2)] == [at.step for at in runs[3]]
    )
    assert [at.step for at in runs[2]] == [0, 0]
    assert {at.grid for at in runs[3]} == {(3, 6, 4)}


def dense_and_sparse(psa):
    """How many steps of the last run were dense, and how many sparse."""
    rows = [row[0] for row in psa.stats().density if row[0] is not None]
    return sum(value == 1 for value in rows), sum(value < 1 for value in rows)


def test_a_pipeline_made_of_another_s_parts_has_its_own_steps():
    """`from_pipe` shares transformer and scheduler; strength and step count are those of the pipeline that runs."""
    pipe = tiny_wan(num_layers=2)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    v2v = WanVideoToVideoPipeline.from_pipe(pipe)
    v2v.set_progress_bar_config(disable=True)
    with apply_psa(pipe, preset(), strict=True) as psa:
        v2v(**V2V, num_inference_steps=16, strength=0.5)
        assert dense_and_sparse(psa) == (2, 6) and psa.stats().steps == 8
        run(pipe)
        assert dense_and_sparse(psa) == (1, 3)
        v2v(**V2V, num_inference_steps=16, strength=1.0)
        assert dense_and_sparse(psa) == (4, 12) and psa.stats().steps == 16 and psa.stats().fallbacks == {}


def test_a_pipeline_that_shares_the_transformer_alone():
    pipe = tiny_wan(num_layers=2)
    other = WanPipeline(**{**pipe.components, "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)})
    other.set_progress_bar_config(disable=True)
    with apply_psa(pipe, preset(), strict=True) as psa:
        run(pipe, num_inference_steps=5)
        run(other, num_inference_steps=8)
        assert dense_and_sparse(psa) == (2, 6) and (psa.stats().steps, psa.stats().missed) == (8, None)
        run(pipe, num_inference_steps=4)
        assert dense_and_sparse(psa) == (1, 3) and psa.stats().steps == 4


@pytest.mark.parametrize("new_scheduler", [False, True])
def test_a_patched_pipeline_that_another_replaced(new_scheduler):
    pipe = tiny_wan(num_layers=2)
    processor = PSAProcessor(pipe, preset(), strict=True)
    pipe.transformer.set_attn_processor(processor)
    pipe = WanPipeline.from_pipe(pipe)
    gc.collect()
    if new_scheduler:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    run(pipe, num_inference_steps=8)
    assert dense_and_sparse(processor) == (2, 6)


def loop(pipe, timesteps, step=None):
    """A denoising loop by hand."""
    text, _ = pipe.encode_prompt("a", "b", max_sequence_length=16)
    x = torch.randn(1, 16, 3, 16, 16)
    for t in timesteps:
        noise = pipe.transformer(x, t.expand(1), text, return_dict=False)[0]
        x = x - 0.1 * noise if step is None else step(noise, t, x, return_dict=False)[0]
    return x


@torch.no_grad()
def test_a_loop_by_hand_over_the_pipeline_s_scheduler():
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset(), strict=True) as psa:
        for step in (pipe.scheduler.step, None):
            pipe.scheduler.set_timesteps(8)
            loop(pipe, pipe.scheduler.timesteps, step)
            assert dense_and_sparse(psa) == (2, 6) and psa.stats().steps == 8
        # Only the last timesteps of those that were set, as for a strength of one half.
        pipe.scheduler.set_timesteps(8)
        loop(pipe, pipe.scheduler.timesteps[4:], pipe.scheduler.step)
        assert dense_and_sparse(psa) == (1, 3) and psa.stats().steps == 4


@torch.no_grad()
@pytest.mark.parametrize("after_a_run", [False, True])
def test_a_loop_by_hand_over_another_s_timesteps_is_told_or_tells(after_a_run):
    pipe = tiny_wan(num_layers=2)
    mine = FlowMatchEulerDiscreteScheduler(shift=7.0)
    mine.set_timesteps(8)
    with apply_psa(pipe, preset()) as psa:
        if after_a_run:
            run(pipe, num_inference_steps=5)
        finished = psa.stats()
        with pytest.warns(PSAFallbackWarning, match=r"denoising step is unknown, because .*with psa\.run\(timesteps\)"):
            loop(pipe, mine.timesteps)
        stats = psa.stats()
        assert sum(stats.fallbacks.values()) == 8 * 2 and all("step is unknown" in x for x in stats.fallbacks)
        assert (stats.steps, stats.density) == (finished.steps, finished.density)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSAFallbackWarning)
            for timesteps in (mine.timesteps, mine.timesteps.tolist()):
                with psa.run(timesteps):
                    loop(pipe, mine.timesteps)
                assert dense_and_sparse(psa) == (2, 6)
                assert (psa.stats().steps, psa.stats().fallbacks) == (8, {})
    with apply_psa(pipe, preset(), strict=True) as psa:
        with pytest.raises(PSAFallbackError, match="denoising step is unknown"):
            loop(pipe, mine.timesteps)
        with psa.run(mine.timesteps[:4]), pytest.raises(PSAFallbackError, match="none of those that psa"):
            loop(pipe, mine.timesteps)
        for nothing in ([], [[1.0]], ["a"], [float("nan")], 3.0):
            with pytest.raises(ValueError, match=r"timesteps=.*: expected the timesteps of all denoising steps"):
                psa.run(nothing).__enter__()


def test_the_loop_of_the_docs_is_sparse_as_it_stands():
    docs = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    (snippet,) = (part.split("```")[0] for part in docs.split("```python\n") if "psa.run(timesteps)" in part)
    pipe = tiny_wan(num_layers=2)
    timesteps = torch.tensor([900.0, 600.0, 400.0, 100.0])
    with torch.no_grad():
        text, _ = pipe.encode_prompt("a", "b", max_sequence_length=16)
    with apply_psa(pipe, preset()) as psa:
        exec(snippet, {"latents": torch.randn(1, 16, 3, 16, 16), **locals(), "torch": torch})
        assert psa.stats().fallbacks == {} and psa.stats().density_sparse < 0.5


@torch.no_grad()
def test_a_loop_over_strange_timesteps_gives_one_warning():
    """Not one for each timestep, of which a run may have fifty."""
    pipe = tiny_wan(num_layers=2)
    pipe.scheduler.set_timesteps(4)
    with apply_psa(pipe, preset()) as psa:
        with pytest.warns(PSAFallbackWarning, match=r"timesteps such as 700 are none of the 4 timesteps of") as told:
            loop(pipe, torch.tensor([700.0, 300.0, 100.0]))
        assert len(told) == len(psa.stats().fallbacks) == 1
        with (
            psa.run([900, 500]),
            pytest.warns(PSAFallbackWarning, match="such as 700 are none of those that psa") as told,
        ):
            loop(pipe, torch.tensor([700.0, 300.0, 100.0]))
        assert len(told) == 1
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler._step_index = 1  # stepped, but the model is given something else
        with pytest.warns(
            PSAFallbackWarning, match="other timesteps, such as 700 where the 4 timesteps of .* at "
        ) as told:
            loop(pipe, torch.tensor([700.0, 300.0, 100.0]))
        assert len(told) == 1


@torch.no_grad()
def test_a_scheduler_that_nobody_has_set_has_no_steps():
    """It has the thousand timesteps of its training."""
    pipe = tiny_wan(num_layers=2)
    assert len(pipe.scheduler.timesteps) == 1000
    with apply_psa(pipe, preset(dense_steps=0.0)) as psa:
        with pytest.warns(PSAFallbackWarning, match="the patched pipeline's scheduler has no timesteps set"):
            loop(pipe, torch.tensor([500.0]))
        assert (psa.stats().steps, psa.stats().density) == (0, [])


class Loop:
    """A pipeline of somebody's own."""

    def __init__(self, pipe, scheduler):
        self.pipe, self.transformer, self.scheduler = pipe, pipe.transformer, scheduler

    def __call__(self, steps):
        self.scheduler.set_timesteps(steps)
        return loop(self.pipe, self.scheduler.timesteps, self.scheduler.step)


class Trainer(Loop):
    """What has a scheduler of the learning rate."""

    def __call__(self, steps):
        self.pipe.scheduler.set_timesteps(steps)
        return loop(self.pipe, self.pipe.scheduler.timesteps, self.pipe.scheduler.step)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "scheduler"), [(Loop, FlowMatchEulerDiscreteScheduler(shift=9.0)), (Trainer, SimpleNamespace(step=None))]
)
def test_a_pipeline_of_somebody_s_own(kind, scheduler):
    pipe = tiny_wan(num_layers=2)
    with apply_psa(pipe, preset(), strict=True) as psa:
        run(pipe)
        kind(pipe, scheduler)(8)
        assert dense_and_sparse(psa) == (2, 6) and psa.stats().steps == 8


@torch.no_grad()
def test_a_modular_pipeline():
    """Its blocks are handed it, and no method of its own runs the loop."""
    if not hasattr(diffusers, "WanBlocks"):
        pytest.skip("this diffusers has no modular Wan pipeline")
    parts = tiny_wan(num_layers=2).components
    pipe = diffusers.WanBlocks().init_pipeline()
    pipe.update_components(**{name: parts[name] for name in pipe.components if parts.get(name) is not None})

    def call(steps):
        size = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 16, "output": "latents"}
        seed = torch.Generator().manual_seed(0)
        return pipe(prompt="a", negative_prompt="b", num_inference_steps=steps, generator=seed, **size)

    stock = call(8)
    with apply_psa(pipe, preset(), strict=True) as psa:
        for steps, expected in ((8, (2, 6)), (4, (1, 3))):
            call(steps)
            assert dense_and_sparse(psa) == expected and psa.stats().steps == steps
    with apply_psa(pipe, EVERYTHING, strict=True):
        torch.testing.assert_close(call(8), stock, rtol=0, atol=2e-5)
    assert torch.equal(call(8), stock)


def test_positional_arguments_are_told_apart_by_the_model_s_signature():
    """CogVideoX takes the timestep third, most others second."""
    pipe = tiny_cogvideox_2b()
    log = Log(pipe)
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[:2]:
            pipe.transformer(torch.randn(1, 3, 4, 16, 16), torch.randn(1, 16, 32), t[None])
    at = log.seen[-1][1]
    assert (at.step, at.run.steps, at.grid) == (1, 3, (3, 8, 8))


def test_restore_stops_watching():
    pipe = tiny_wan()
    hooks = len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)
    with apply_psa(pipe, preset()) as psa:
        run(pipe, num_inference_steps=1)
        assert psa.stats().run == 1
    run(pipe, num_inference_steps=1)
    assert psa.stats().run == 1
    assert hooks == (len(pipe.transformer._forward_pre_hooks), len(pipe.transformer._forward_hooks)) == (0, 0)
