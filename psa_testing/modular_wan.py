"""A tiny Wan as a modular pipeline, saved as its index and components; for tests of pipelines that are only modular."""

from __future__ import annotations

from pathlib import Path

from diffusers import WanModularPipeline, WanPipeline

from psa_diffusers.families.pipeline_kind import PipelineKind
from psa_testing.tiny_pipelines import tiny_wan

COMPONENTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
KIND = PipelineKind(modular=True, guider=True)  # what the commands would know of it


def save_modular_wan(folder: Path, parts: WanPipeline | None = None) -> None:
    """Write the components, those of an ordinary pipeline if one is given, and modular_model_index.json."""
    parts = parts or tiny_wan(num_layers=2)
    pipe = WanModularPipeline()
    pipe.update_components(**{name: getattr(parts, name) for name in COMPONENTS})
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
