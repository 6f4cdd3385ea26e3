"""The position of one forward: which step its timestep means, where rounding and schedulers leave several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from psa_diffusers import apply_psa
from psa_diffusers.patch import schedule
from psa_diffusers.patch.schedule import LastForward, Schedule, UnknownStepError
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")


def stepping(timesteps, num_timesteps=3, **scheduler):
    """A pipeline that runs with a scheduler; the first argument is its transformer."""
    scheduler = SimpleNamespace(timesteps=torch.tensor(timesteps), **scheduler)
    return Stepping(SimpleNamespace(), scheduler, num_timesteps)


class Stepping:
    def __init__(self, transformer, scheduler, num_timesteps):
        self.transformer, self.scheduler = transformer, scheduler
        if num_timesteps:
            self._num_timesteps = num_timesteps

    def position(self, timestep):
        at = Schedule(self).position(self.transformer, timestep)
        return at.index - at.first, len(at.timesteps) - at.first


def test_schedulers_without_a_step_index_are_read_from_the_timestep():
    pipe = stepping([900.0, 700.0, 500.0, 250.0, 10.0])
    assert pipe.position(torch.tensor([500.0])) == (0, 3)
    assert pipe.position(torch.tensor(251.3, dtype=torch.bfloat16)) == (1, 3)
    assert pipe.position(torch.tensor([[0.0, 0.0, 10.0]])) == (2, 3)
    assert pipe.position(250) == (1, 3)
    # The largest entry is meant: image conditions have timestep 0.
    assert pipe.position(torch.tensor([[0.0, 0.0, 500.0]])) == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_an_entry_of_the_timesteps_is_not_read_from_the_device(dtype, monkeypatch):
    pipe = stepping([900, 700, 500, 250, 10])
    pipe.scheduler.timesteps = torch.tensor([1000, 900, 700, 500, 250, 10, 0]).to(dtype)[1:-1]
    every_other = torch.tensor([500, 900, 250, 700, 10, 500]).to(dtype)
    monkeypatch.setattr(schedule, "_largest", lambda timestep: pytest.fail("it was read"))
    steps = [
        pipe.position(each) for entry in pipe.scheduler.timesteps for each in (entry, entry.expand(2), entry[None])
    ]
    assert steps == [(step, 3) for step in (-2, -1, 0, 1, 2) for _ in range(3)]
    pipe.scheduler.timesteps = every_other[1::2]
    assert pipe.position(every_other[3]) == (1, 3)
    for other in (every_other[2], every_other[:2], every_other.clone()[3], every_other[3].double()):
        with pytest.raises(pytest.fail.Exception):
            pipe.position(other)


def test_early_steps_that_lie_close_together():
    """With a shift of 5 and 50 steps they differ by less than what bfloat16 may make of them."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(50)
    pipe, timesteps = Stepping(None, scheduler, None), scheduler.timesteps
    assert float(timesteps[0] - timesteps[1]) < 4.2 and scheduler.step_index is None  # a loop that never steps it
    for dtype in (torch.float32, torch.bfloat16):
        found = [Schedule(pipe).position(SimpleNamespace(), t.to(dtype)).index for t in timesteps]
        assert found[:4] == [0, 1, 2, 3] and (dtype == torch.bfloat16 or found == list(range(50)))
    # A first step is not taken for a later one, to which it would be rounded as well.
    pipe = stepping([999.0, 998.0, 997.0], step_index=None)
    for given in (torch.tensor(999.0), torch.tensor(999.0).bfloat16(), torch.tensor(999.4)):
        assert pipe.position(given) == (0, 3)


@torch.no_grad()
def test_timesteps_that_bfloat16_makes_equal():
    """As a loop gives them that casts them to the dtype of the latents."""
    pipe, scheduler = (
        tiny_wan(num_layers=1),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0),
    )
    scheduler.set_timesteps(50)
    given = scheduler.timesteps.bfloat16()
    assert len(given.unique()) < 45 and given[0] == given[1]
    text, _ = pipe.encode_prompt("a", "b", max_sequence_length=16)
    with apply_psa(pipe, preset(dense_steps=1.0, refresh=2), strict=True) as psa, psa.run(scheduler.timesteps):
        steps = []
        for t in given:
            x = torch.randn(1, 16, 1, 4, 4)
            for _ in ("a prompt", "none"):
                pipe.transformer(x, t.expand(1), text)
                steps.append(psa.processor._runs._run.step)
    assert steps == [step for step in range(50) for _ in range(2)]


def test_a_timestep_that_comes_twice():
    """As those of schedulers of second order do."""
    schedule = Schedule(stepping([1.0]))
    twice = torch.tensor([500.0])
    with schedule.told.tell([900.0, 500.0, 500.0, 10.0]):
        for was_last, expected in ((False, [1, 1, 2, 1]), (True, [1, 2, 2, 1])):
            last = [LastForward(step, was_last) for step in (0, 1, 2, 3)]
            found = [schedule.position(None, twice, lambda timesteps, each=each: each).index for each in last]
            assert found == expected


def test_unknown_positions():
    for pipe, timestep in (
        (Stepping(None, None, None), None),
        (Stepping(None, SimpleNamespace(timesteps=None), None), None),
        (stepping([3.0, 2.0, 1.0]), None),
        # The run is over, and the transformer is called by somebody else.
        (stepping([3.0, 2.0, 1.0], step_index=3), torch.tensor([3.0])),
        # Its scheduler is elsewhere.
        (stepping([900.0, 500.0, 100.0], step_index=1), torch.tensor([900.0])),
    ):
        with pytest.raises(UnknownStepError, match="the denoising step is unknown, because "):
            Schedule(pipe).position(SimpleNamespace(), timestep)
        if pipe.transformer is not None:
            with pytest.raises(UnknownStepError, match="the denoising step is unknown, because "):
                pipe.position(timestep)
