"""`psa-generate --check` on models of two transformers: which of them gets a correction."""

from dataclasses import replace

import pytest

from psa_diffusers import apply_psa, load_preset
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.schedulers import first_expert_steps
from psa_diffusers.patch.corrections import Corrections
from psa_diffusers.runs.check.check import check_plan
from psa_diffusers.runs.check.text import as_text
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 8
OTHER = "no corrections, as the dense phase ends with a step of the other transformer"


@pytest.mark.parametrize("dense_steps", [1, 6])
def test_only_the_transformer_of_the_last_dense_step_is_corrected(dense_steps, saved, monkeypatch):
    preset = load_preset("psa-auto").replace(min_tokens=0, dense_steps=dense_steps)
    size = {"height": 64, "width": 64, "frames": 9}
    plan = make_plan(Request(prompts=(), check=True, model=str(saved / "experts"), steps=STEPS, **size))
    check = check_plan(replace(plan, preset=preset))
    steps, corrected = {"transformer": 0, "transformer_2": 0}, set()
    keep = Corrections.keep
    monkeypatch.setattr(
        Corrections,
        "keep",
        lambda self, layer, *rest: corrected.add(layer.name.split(".")[0]) or keep(self, layer, *rest),
    )
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu", offload="none")
    pipe.set_progress_bar_config(disable=True)
    with apply_psa(pipe, preset):
        for name in steps:
            getattr(pipe, name).register_forward_hook(lambda *_, name=name: steps.update({name: steps[name] + 1}))
        pipe(
            "a cat",
            num_inference_steps=STEPS,
            height=64,
            width=64,
            num_frames=9,
            guidance_scale=1,
            output_type="latent",
        )
    assert first_expert_steps(plan.model, None, STEPS) == steps["transformer"] and 1 < steps["transformer"] < 6
    assert {expert.network.name for expert in check.experts if expert.corrections} == corrected
    assert corrected == {"transformer" if dense_steps == 1 else "transformer_2"}
    first, second = " ".join(as_text(check).split()).split("For pipe.transformer_2 ")
    assert (OTHER in first, OTHER in second) == (dense_steps == 6, dense_steps == 1)


def test_the_flow_shift_of_the_run_decides(saved):
    model = make_plan(Request(prompts=(), check=True, model=str(saved / "experts"))).model
    shares = [first_expert_steps(model, shift, 40) for shift in (None, 3.0, 12.0)]
    assert shares[0] == shares[1] < shares[2] < 40


def test_what_configurations_do_not_tell_is_not_known(saved, monkeypatch):
    one = make_plan(Request(prompts=(), check=True, model=str(saved / "wan"))).model
    assert first_expert_steps(one, None, 8) is None
    two = make_plan(Request(prompts=(), check=True, model=str(saved / "experts"))).model
    boundless = {"boundary_ratio": None}
    monkeypatch.setattr("psa_diffusers.checkpoints.schedulers.read_json", lambda *_: boundless)
    assert first_expert_steps(two, None, 8) == 8
    boundless["boundary_ratio"] = 0.9  # of a scheduler that is not told
    assert first_expert_steps(two, None, 8) is None
