"""Runs of tiny Wan pipelines that are compared as latents."""

from __future__ import annotations

from typing import Any

import torch

from psa_testing.tiny_pipelines import run as run_small

# 192 tokens in all: blocks of 32 and 16 leave something to choose.
SIZE = {"height": 128, "width": 128}


def run(pipe: Any, **overrides: Any) -> torch.Tensor:
    """Latents rather than frames: the VAE has no part in what is tested, and takes most of the time."""
    return run_small(pipe, **{**SIZE, "output_type": "latent", **overrides})
