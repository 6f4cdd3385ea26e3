"""Cosmos: whatever its models are given for a timestep, conditions that have their own, control networks and images."""

from __future__ import annotations

import inspect
import warnings

import diffusers
import pytest
import torch
from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from psa_diffusers import apply_psa
from psa_diffusers.families.cosmos import CARDS, Cosmos
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.families import CASES
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_image

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["cosmos", "cosmos-i2v", "cosmos2", "cosmos2-t2i", "cosmos2.5", "cosmos2.5-transfer"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_cards_are_the_defaults_of_their_pipelines(card):
    pipeline = getattr(diffusers, card.pipeline)
    defaults = {name: each.default for name, each in inspect.signature(pipeline.__call__).parameters.items()}
    mine = (card.height, card.width, card.frames, card.steps, card.guidance)
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    assert mine == tuple(defaults[name] for name in names)
    assert card.fps == defaults.get("fps", 16)  # Cosmos 2.5's is not an argument
    assert card.negative_prompt == inspect.getmodule(pipeline).DEFAULT_NEGATIVE_PROMPT


def rows(stats):
    """Of each step, whether it was dense."""
    return [row[0] == 1 for row in stats.density]


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_known_in_every_pipeline(name):
    case, pipe = CASES[name], CASES[name].make()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, num_inference_steps=6)
    stats = psa.stats()
    assert (stats.run, stats.steps, stats.dense_steps, stats.fallbacks) == (1, 6, 3, {})
    assert rows(stats) == [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", ["cosmos", "cosmos2", "cosmos2.5"])
def test_steps_are_known_in_bfloat16(name):
    """In which the first ones of Cosmos 2 are the same number."""
    case, pipe = CASES[name], CASES[name].make().to(torch.bfloat16)
    small = {"height": 64, "width": 64, "num_frames": 5}
    with apply_psa(pipe, preset(dense_steps=0.25), strict=True) as psa:
        case.run(pipe, num_inference_steps=36, guidance_scale=1.0, **small)
    assert rows(psa.stats()) == [True] * 9 + [False] * 27


def test_a_condition_may_have_more_noise_than_the_video():
    case, pipe = CASES["cosmos2.5"], CASES["cosmos2.5"].make()
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        case.run(pipe, image=tiny_image(128, 128), conditional_frame_timestep=0.5)
    assert rows(psa.stats()) == [True, True, False, False]
    assert float(pipe.scheduler.sigmas[3]) < 0.5


def test_what_the_models_are_given_for_a_timestep():
    edm = EDMEulerScheduler()
    edm.set_timesteps(3)
    assert torch.equal(Cosmos.timesteps(edm), 0.25 * edm.sigmas[:3].log())
    karras = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    karras.register_to_config(sigma_max=80.0, sigma_min=0.002)  # as Cosmos 2's pipelines do
    karras.set_timesteps(sigmas=torch.linspace(0, 1, 3).tolist())
    torch.testing.assert_close(Cosmos.timesteps(karras), torch.tensor([80 / 81, 2.5152 / 3.5152, 0.002 / 1.002]))
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    flow.set_timesteps(3)
    assert torch.equal(Cosmos.timesteps(flow), flow.sigmas[:3])
    each_frame = torch.tensor([0.1, 0.1, 0.02]).view(1, 1, 3, 1, 1)
    assert Cosmos.timestep({"timestep": each_frame}).flatten().tolist() == pytest.approx([0.02])
    assert Cosmos.timestep({"timestep": 7}) == 7 and Cosmos.timestep({}) is None


@torch.no_grad()
def test_a_loop_by_hand():
    """Over the pipeline's scheduler, without its `step`, and over numbers of somebody's own, told and not."""
    pipe = CASES["cosmos2.5"].make()
    latents, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 8, 32)
    condition = {"condition_mask": torch.zeros(1, 1, 3, 16, 16), "padding_mask": torch.zeros(1, 1, 128, 128)}

    def loop(values):
        for value in values:
            pipe.transformer(latents, torch.as_tensor(value).expand(1), text, **condition)

    with apply_psa(pipe, preset(dense_steps=0.5)) as psa:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSAFallbackWarning)
            pipe.scheduler.set_timesteps(4)
            loop(pipe.scheduler.sigmas[:4])
            assert rows(psa.stats()) == [True, True, False, False]
        with pytest.warns(PSAFallbackWarning, match="denoising step is unknown") as told:
            loop([0.9, 0.9])
        assert len(told) == 1 and list(psa.stats().fallbacks.values()) == [2 * 2]
        with warnings.catch_warnings():
            warnings.simplefilter("error", PSAFallbackWarning)
            with psa.run([0.9, 0.7, 0.5]):
                loop([0.9, 0.7, 0.5])
            assert rows(psa.stats()) == [True, True, False]
    with apply_psa(pipe, preset(), strict=True), pytest.raises(PSAFallbackError, match="step is unknown"):
        loop([0.9])


def test_transfer_makes_every_chunk_a_run_and_keeps_its_control_network():
    case, pipe = CASES["cosmos2.5-transfer"], CASES["cosmos2.5-transfer"].make()
    control = [module for module in pipe.controlnet.modules() if hasattr(module, "processor")]
    before = [module.processor for module in control]
    with apply_psa(pipe, preset(dense_steps=0.5), strict=True) as psa:
        assert [module.processor for module in control] == before
        case.run(pipe, controls=[tiny_image(96, 96)] * 13, num_frames=None)
    stats = psa.stats()
    assert (stats.run, stats.steps, stats.dense_steps) == (2, 3, 2)
    assert rows(stats) == [True, True, False] and stats.layers == ["transformer_blocks.0", "transformer_blocks.1"]
