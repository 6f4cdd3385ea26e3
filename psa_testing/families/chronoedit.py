"""ChronoEdit: a tiny random pipeline, and the published transformer.

Its configuration is the stored one (transformer/config.json of the repository's copies), Wan's of 14B with an image.
"""

from __future__ import annotations

import torch
from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel, UniPCMultistepScheduler
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from psa_diffusers.families.chronoedit import ChronoEdit
from psa_testing.cases import GUIDED, IMAGE, Case, ParallelCase, Ranks, SavedCase
from psa_testing.declaration import FamilyTests
from psa_testing.families import wan
from psa_testing.full_size import Network

MODEL = "ChronoEditTransformer3DModel"


def tiny_chronoedit(heads: int = 2) -> ChronoEditPipeline:
    """Editing of an image, with an image encoder as Wan 2.1's."""
    torch.manual_seed(0)
    image = {"in_channels": 36, "image_dim": 4, "added_kv_proj_dim": 16 * heads}
    config = {**wan.TRANSFORMER, **image, "num_attention_heads": heads}
    parts = wan.parts(ChronoEditTransformer3DModel(**config))
    # Temporal reasoning cuts what the scheduler keeps of earlier steps.
    parts["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    vision = CLIPVisionConfig(
        hidden_size=4,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    return ChronoEditPipeline(
        **parts,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=4, size=4),
    )


# Its cross-attention takes the last 512 tokens for the text, so there must be as many.
_RUN = {**GUIDED, "image": IMAGE, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 4}

TESTS = FamilyTests(
    family=ChronoEdit,
    cases={
        "chronoedit": Case(
            tiny_chronoedit,
            _RUN,
            (
                {"num_temporal_reasoning_steps": 2, "height": 96, "width": 160},
                {"enable_temporal_reasoning": False},
            ),
            one_each=True,
        ),
    },
    networks={MODEL: Network(wan.inputs, wan.toy)},
    published=(
        wan.published(
            "nvidia/ChronoEdit-14B-Diffusers",
            (1, 36, 2, 90, 160),
            (2, 45, 80),
            "14B",
            wan.IMAGE_CONFIG,
            model=MODEL,
            toy=True,
        ),
    ),
    parallel={"chronoedit": ParallelCase(Case(lambda: tiny_chronoedit(heads=4), _RUN), (Ranks(2),))},
    saved={"chronoedit": SavedCase(tiny_chronoedit, size=128, frames=5)},
)
