"""Steps are read from the pipeline: right with guidance off, several experts, skipped timesteps and aborted runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from psa_diffusers.families.cogvideox import CogVideoX
from psa_diffusers.families.wan import Wan
from psa_diffusers.patch.step import DenoisingTracker, denoising_position
from psa_testing.families.cogvideox import tiny_cogvideox_2b
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_image, tiny_wan, tiny_wan_expanded, tiny_wan_i2v, tiny_wan_v2v


def run(pipe, **overrides):
    """Latents rather than frames: the VAE has no part in what is tested, and takes most of the time."""
    return run_small(pipe, **{"output_type": "latent", **overrides})


class Log(DenoisingTracker):
    """A tracker that writes down what each forward belongs to."""

    def __init__(self, pipe, *names):
        super().__init__(pipe, Wan.token_grid)
        self.seen = []
        for name in names:
            transformer = getattr(pipe, name)
            self.attach(transformer)
            transformer.register_forward_pre_hook(lambda *_, name=name: self.seen.append((name, self.current)))

    def steps(self, name=None):
        return [at.step for which, at in self.seen if name in (None, which)]


def test_each_step_has_one_forward_a_guidance_branch():
    pipe = tiny_wan()
    log = Log(pipe, "transformer")
    run(pipe)
    assert log.steps() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [at.branch for _, at in log.seen] == [0, 1] * 4
    assert {(at.steps, at.grid, at.run) for _, at in log.seen} == {(4, (3, 4, 4), 1)}


def test_without_guidance_a_step_is_one_forward():
    pipe = tiny_wan()
    log = Log(pipe, "transformer")
    run(pipe, guidance_scale=1.0)
    assert log.steps() == [0, 1, 2, 3] and {at.branch for _, at in log.seen} == {0}


def test_two_experts_count_the_steps_of_the_whole_run():
    pipe = tiny_wan(two_stage=True)
    log = Log(pipe, "transformer", "transformer_2")
    run(pipe, num_inference_steps=6, guidance_scale=1.0)
    first, second = log.steps("transformer"), log.steps("transformer_2")
    assert first and second and first + second == [0, 1, 2, 3, 4, 5]
    assert {at.branch for _, at in log.seen} == {0}


def test_video_to_video_counts_the_steps_that_it_does():
    pipe = tiny_wan_v2v()
    log = Log(pipe, "transformer")
    frames = [tiny_image()] * 9
    for strength, steps in ((0.6, 6), (1.0, 10), (0.3, 3)):
        log.seen.clear()
        pipe(
            prompt="a",
            video=frames,
            strength=strength,
            num_inference_steps=10,
            guidance_scale=1.0,
            height=64,
            width=64,
            max_sequence_length=16,
            output_type="latent",
        )
        assert log.steps() == list(range(steps)) and {at.steps for _, at in log.seen} == {steps}


@pytest.mark.parametrize("make", [tiny_wan_expanded, tiny_wan_i2v])
def test_timesteps_per_token_and_image_conditions(make):
    pipe = make()
    log = Log(pipe, "transformer")
    run(pipe, **({"image": tiny_image()} if make is tiny_wan_i2v else {}))
    assert log.steps() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("steps", [1, 3])
def test_every_call_is_a_new_run_also_after_an_aborted_one(steps):
    pipe = tiny_wan()
    log = Log(pipe, "transformer")
    run(pipe, num_inference_steps=steps)

    def abort(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, num_inference_steps=steps, callback_on_step_end=abort)
    run(pipe, num_inference_steps=steps, height=96)
    runs = {number: [at for _, at in log.seen if at.run == number] for number in (1, 2, 3)}
    assert (
        [at.step for at in runs[1]] == [step for step in range(steps) for _ in range(2)] == [at.step for at in runs[3]]
    )
    assert [at.step for at in runs[2]] == [0, 0]
    assert {at.grid for at in runs[3]} == {(3, 6, 4)}


def scheduler_without_index(timesteps):
    return SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor(timesteps)), _num_timesteps=3)


def test_schedulers_without_a_step_index_are_read_from_the_timestep():
    pipe = scheduler_without_index([900.0, 700.0, 500.0, 250.0, 10.0])
    assert denoising_position(pipe, torch.tensor([500.0])) == (0, 3)
    assert denoising_position(pipe, torch.tensor(251.3, dtype=torch.bfloat16)) == (1, 3)
    assert denoising_position(pipe, torch.tensor([[0.0, 0.0, 10.0]])) == (2, 3)


def test_positional_arguments_are_told_apart_by_the_model_s_signature():
    """CogVideoX takes the timestep third, most others second."""
    pipe = tiny_cogvideox_2b()
    pipe.scheduler.set_timesteps(3)
    tracker = DenoisingTracker(pipe, CogVideoX.token_grid)
    tracker.attach(pipe.transformer)
    with torch.no_grad():
        pipe.transformer(torch.randn(1, 3, 4, 16, 16), torch.randn(1, 16, 32), pipe.scheduler.timesteps[1:2])
    assert (tracker.current.step, tracker.current.steps, tracker.current.grid) == (1, 3, (3, 8, 8))


def test_unknown_positions():
    assert denoising_position(SimpleNamespace(), None) is None
    assert denoising_position(SimpleNamespace(scheduler=SimpleNamespace(timesteps=None)), None) is None
    assert denoising_position(scheduler_without_index([3.0, 2.0, 1.0]), None) is None
    pipe = scheduler_without_index([3.0, 2.0, 1.0])
    pipe.scheduler.step_index = 3  # the run is over, and the transformer is called by somebody else
    assert denoising_position(pipe, None) is None


def test_detach_stops_watching():
    pipe = tiny_wan()
    tracker = DenoisingTracker(pipe, Wan.token_grid)
    tracker.attach(pipe.transformer)
    run(pipe, num_inference_steps=1)
    assert tracker.current is not None
    tracker.detach()
    run(pipe, num_inference_steps=1)
    assert tracker.current is None and not pipe.transformer._forward_pre_hooks
