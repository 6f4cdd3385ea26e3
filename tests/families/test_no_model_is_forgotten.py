"""Every model of the installed diffusers that makes videos is supported, or says why not."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest

from psa_diffusers.families import FAMILIES, UnsupportedModelError, find_family
from psa_diffusers.families.lookup import REASONS
from psa_diffusers.patch.modules import find_transformers
from psa_testing.families import HERE
from psa_testing.video_models import video_models

SUPPORTED = {name for family in FAMILIES for name in family.transformers}
# The text of files of a made-up package.
BASES = "ModelMixin, ConfigMixin"
OUTPUT = "class NewPipelineOutput(BaseOutput):\n    '''New.'''\n\n    {}: torch.Tensor\n"
BY_NAME = {"models/transformers/transformer_new.py": f"class NewTransformer3DModel({BASES}):\n    ..."}
MODEL = {"models/transformers/transformer_new.py": f"class NewOmniTransformer(\n    {BASES}\n):\n    ..."}
IMPORTS = "from ...models import NewOmniTransformer\nfrom .pipeline_output import NewPipelineOutput\n"
PIPELINE = {
    "pipelines/new/pipeline_output.py": OUTPUT.format("frames"),
    "pipelines/new/pipeline_new.py": IMPORTS,
}
UNNAMED = "def __init__(\n    transformer: Any,\n):\n    ...\nreturn NewPipelineOutput(frames=video)\n"
UNKNOWN_MODEL = {**PIPELINE, "pipelines/new/pipeline_new.py": UNNAMED}
BLOCKS = {
    "modular_pipelines/new/denoise.py": 'ComponentSpec("transformer", NewOmniTransformer)',
    "modular_pipelines/new/blocks.py": 'OutputParam.template("videos")',
}
IMAGES = {
    **PIPELINE,
    **BLOCKS,
    "pipelines/new/pipeline_output.py": OUTPUT.format("images"),
    "modular_pipelines/new/blocks.py": 'OutputParam.template("images")',
}


def test_every_video_model_is_supported_or_says_why_not():
    """Where this fails, a family is to be added, or a row in REASONS that says why not."""
    found = video_models(Path(diffusers.__file__).parent)
    assert [f"{name} of {files[0]}" for name, files in found.items() if name not in SUPPORTED | set(REASONS)] == []


def test_what_is_supported_is_found():
    """So that a rule that finds too little is seen."""
    found = video_models(Path(diffusers.__file__).parent)
    assert {name for family in HERE for name in family.transformers} <= set(found)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (BY_NAME, ["NewTransformer3DModel"]),
        (MODEL | PIPELINE, ["NewOmniTransformer"]),
        (MODEL | UNKNOWN_MODEL, ["pipeline_new.py"]),
        (MODEL | BLOCKS, ["NewOmniTransformer"]),
        (MODEL | IMAGES, []),
    ],
    ids=["name", "pipeline", "pipeline-of-an-unknown-model", "modular", "images"],
)
def test_a_new_model_is_found(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(video_models(tmp_path)) == expected


@pytest.mark.parametrize("name", [name for name in REASONS if hasattr(diffusers, name)])
def test_what_is_not_supported_says_why(name):
    kind = getattr(diffusers, name)
    with pytest.raises(UnsupportedModelError, match=rf"^{name} is not supported, because {REASONS[name]}; supported: "):
        find_family(kind.__new__(kind))


def test_a_unet_is_refused_with_its_reason():
    kind = diffusers.UNetSpatioTemporalConditionModel
    pipe = type("StableVideoDiffusionPipeline", (), {"unet": kind.__new__(kind)})()
    message = "^StableVideoDiffusionPipeline has no transformer: it has a UNetSpatioTemporal.*within one frame or along"
    with pytest.raises(UnsupportedModelError, match=message):
        find_transformers(pipe)
