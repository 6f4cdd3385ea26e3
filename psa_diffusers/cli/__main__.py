"""`python -m psa_diffusers.cli` is psa-generate, as `accelerate launch -m` takes it."""

from psa_diffusers.cli.generate import generate

generate()
