"""How the aliases of LTX-2 run: as diffusers' documentation says, which for 2.5 is not what the pipeline does alone."""

from __future__ import annotations

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.utils import DEFAULT_NEGATIVE_PROMPT, DISTILLED_SIGMA_VALUES

from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.families.ltx2 import CARDS
from psa_diffusers.runs.pipeline_call import generate_video
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request
from psa_testing.families.ltx2 import tiny_ltx2

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_distilled_model_runs_at_the_noise_levels_of_its_card(tmp_path):
    """By the name of its repository, which the folder carries."""
    folder, preset_file = tmp_path / "LTX-2.5-Diffusers", tmp_path / "small.yaml"
    saved = tiny_ltx2()
    saved.scheduler = FlowMatchEulerDiscreteScheduler()
    saved.save_pretrained(folder)
    preset_file.write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.7]\n")
    request = Request(("a cat",), str(folder), str(preset_file), height=32, width=32, frames=9)
    plan = make_plan(request)
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu", offload="none")
    calls = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    generate_video(pipe, plan, "a cat", "dense", 0)
    # No guidance by the prompt, but by perturbation and by each modality alone.
    assert calls == 8 * 3 * [1]
    torch.testing.assert_close(pipe.scheduler.timesteps, 1000 * torch.tensor(DISTILLED_SIGMA_VALUES))
    with pytest.raises(InputError, match=r"^--steps 20: .* is distilled for 8 steps of given noise levels$"):
        make_plan(replace(request, steps=20))


def test_the_cards_say_what_diffusers_says():
    cards = {card.name: card for card in CARDS}
    for name in ("ltx2", "ltx2-i2v", "ltx2.3", "ltx2.3-i2v", "ltx2.5-full"):
        card = cards[name]
        defaults = inspect.signature(getattr(diffusers, card.pipeline).__call__).parameters
        said = {"height": card.height, "width": card.width, "frame_rate": card.fps, "num_inference_steps": card.steps}
        said["guidance_scale"] = card.guidance
        assert {argument: defaults[argument].default for argument in said} == said
        assert (card.negative_prompt == DEFAULT_NEGATIVE_PROMPT) == (name not in ("ltx2", "ltx2-i2v"))
    assert dict(cards["ltx2.5"].arguments)["sigmas"] == tuple(DISTILLED_SIGMA_VALUES)


def test_the_undistilled_one_has_another_transformer_and_scheduler(tmp_path):
    pipe = tiny_ltx2()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, base_shift=0.95, max_shift=2.05)
    pipe.save_pretrained(tmp_path)
    model = resolve_model(str(tmp_path))
    assert model.card.arguments == model.card.scheduler == ()
    full = next(card for card in CARDS if card.name == "ltx2.5-full")
    assert full.transformer == ("Lightricks/LTX-2.5-Diffusers", "transformer_full/config.json")
    model = replace(model, card=replace(full, parts=()))
    scheduler = load_pipeline(model, dtype="float32", device="cpu", offload="none").scheduler
    assert (scheduler.config.use_dynamic_shifting, scheduler.config.shift_terminal) == (True, 0.1)
    assert scheduler.config.base_shift == 0.95
