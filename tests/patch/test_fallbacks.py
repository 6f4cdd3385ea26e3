"""What cannot be sparse: dense with one warning, an error with `strict`, or refused from the start."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaVideoTransformer3DModel

from psa_diffusers import UnsupportedModelError, apply_psa
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_testing.tiny_families import preset
from psa_testing.tiny_pipelines import tiny_wan
from psa_testing.wan_latents import run


def test_short_sequences_stay_dense_with_one_warning():
    pipe = tiny_wan()
    stock = run(pipe)
    with apply_psa(pipe, preset(min_tokens=193)) as psa:
        with pytest.warns(PSAFallbackWarning, match="192 tokens is shorter than min_tokens=193") as caught:
            assert torch.equal(run(pipe), stock)
            run(pipe)
        assert len([w for w in caught if w.category is PSAFallbackWarning]) == 1
        assert list(psa.stats().fallbacks.values()) == [24] and psa.stats().density_run == 1
    with apply_psa(pipe, preset(min_tokens=193), strict=True), pytest.raises(PSAFallbackError, match="min_tokens=193"):
        run(pipe)
    with apply_psa(pipe, preset(min_tokens=192), strict=True):
        run(pipe)


def test_what_cannot_be_sparse_runs_dense_and_says_why():
    pipe = tiny_wan()
    with apply_psa(pipe, preset(dense_steps=0.0)) as psa:
        run(pipe, num_inference_steps=1)  # the run is over, so the scheduler's index points past its end
        latents, text = torch.randn(1, 16, 3, 16, 16), torch.randn(1, 16, 32)
        with pytest.warns(PSAFallbackWarning, match="denoising step is unknown"), torch.no_grad():
            pipe.transformer(hidden_states=latents, timestep=torch.tensor([5]), encoder_hidden_states=text)
        pipe.scheduler.set_timesteps(4)
        with pytest.warns(PSAFallbackWarning, match="gradients are enabled"):
            pipe.transformer(hidden_states=latents, timestep=pipe.scheduler.timesteps[:1], encoder_hidden_states=text)
        assert list(psa.stats().fallbacks) == ["gradients are enabled, and sparse attention is for inference only"]


def test_unsupported_models_are_named_with_the_reason():
    class OtherTransformer(torch.nn.Module):
        pass

    pipe = tiny_wan()
    pipe.transformer = OtherTransformer()
    message = r"OtherTransformer is not supported, because no family .* describes its attention; supported: Wan 2\.1"
    with pytest.raises(UnsupportedModelError, match=message):
        apply_psa(pipe)
    pipe.transformer = SanaVideoTransformer3DModel.__new__(SanaVideoTransformer3DModel)
    with pytest.raises(
        UnsupportedModelError, match=r"SanaVideo.* because its self-attention is linear already; [^\n]*$"
    ):
        apply_psa(pipe)
    with pytest.raises(UnsupportedModelError, match="object has no transformer"):
        apply_psa(object())
