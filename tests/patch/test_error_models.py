"""`error_model: auto` is `fitted` where outputs are corrected, and `tuned` where they are not."""

from __future__ import annotations

import warnings

import pytest
import torch

from psa_diffusers import apply_psa, load_preset
from psa_diffusers.patch import corrections
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import run as run_small
from psa_testing.tiny_pipelines import tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = preset(dense_steps=1, correction=True, rule="budget", density=0.4, rest="skip")
STEPS = 4


def latents(**changes):
    pipe = tiny_wan()
    with warnings.catch_warnings(), apply_psa(pipe, BUDGET.replace(**changes)):
        warnings.simplefilter("ignore")
        return run_small(pipe, output_type="latent", num_inference_steps=STEPS)


@pytest.mark.parametrize("changes", [{}, {"refresh": 2, "share_guidance": True}], ids=["own-lists", "kept-lists"])
@pytest.mark.parametrize(
    ("given", "model", "room"),
    [
        ({"correction": True}, "fitted", 10**9),
        ({"correction": True}, "tuned", 1000),
        ({"correction": True, "dense_steps": 0}, "tuned", 10**9),
        ({"correction": False}, "tuned", 10**9),
    ],
    ids=["corrected", "no room", "no dense step", "not asked for"],
)
def test_which_it_is(given, model, room, changes, monkeypatch):
    monkeypatch.setattr(corrections, "free_bytes", lambda device: room)
    models = {name: latents(error_model=name, **{**given, **changes}) for name in ("auto", "tuned", "fitted")}
    assert not torch.equal(models["tuned"], models["fitted"])
    assert torch.equal(models["auto"], models[model])


def test_what_a_preset_tells():
    auto = load_preset("psa-auto")
    assert {spec.error_model for spec in auto.layer_specs(3)} == {"fitted"}
    assert {spec.error_model for spec in auto.layer_specs(3, corrected=False)} == {"tuned"}
    for name in ("tuned", "fitted"):
        chosen = auto.replace(error_model=name)
        assert chosen.layer_specs(3) == chosen.layer_specs(3, corrected=False)
