"""ConsisID: CogVideoX's attention, in a model that keeps the face of an image."""

from __future__ import annotations

from psa_diffusers.families.cogvideox import CogVideoX
from psa_diffusers.families.pipeline_kind import PipelineKind


class ConsisID(CogVideoX):
    """ConsisIDTransformer3DModel; the face has cross-attention of its own between the blocks."""

    name = "ConsisID"
    order = 100
    transformers = ("ConsisIDTransformer3DModel",)
    processors = CogVideoX.processors


PIPELINES = {
    "ConsisIDPipeline": PipelineKind(
        in_code_only="it needs what face models make of an image, which this command does not run; "
        "patch it in Python with apply_psa(pipe)",
    ),
}
CARDS = ()
