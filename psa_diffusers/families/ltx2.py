"""LTX-2.0, 2.3 and 2.5: video with sound; video tokens attend each other in an attention of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from psa_diffusers.diffusers_internals import gather, split
from psa_diffusers.families.card import ModelCard, Part
from psa_diffusers.families.family import AttentionCall, DenseOnlyError, ModelFamily
from psa_diffusers.families.parts import first_attentions, one_by_one, project_out, rotate_halves, split_heads
from psa_diffusers.families.pipeline_kind import PipelineKind, SoundOutput
from psa_diffusers.families.rotation import Rotation, every_other

if TYPE_CHECKING:
    import torch

    Tables = tuple[torch.Tensor, torch.Tensor]


class LTX2(ModelFamily):
    """LTX2VideoTransformer3DModel: text and image to video, conditions, references, and the refinement of latents.

    Sound has attentions of its own, and others to and from the video: all of them are left alone. Tokens of keyframes
    and references follow those of the video.
    """

    name = "LTX-2"
    order = 51
    transformers = ("LTX2VideoTransformer3DModel",)
    processors = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
    arguments = (
        "hidden_states",
        "encoder_hidden_states",
        "attention_mask",
        "query_rotary_emb",
        "key_rotary_emb",
        "perturbation_mask",
        "all_perturbed",
    )
    appended = True
    replicates_text = True

    @staticmethod
    def self_attentions(transformer: Any) -> dict[str, torch.nn.Module]:
        return first_attentions(transformer)

    @staticmethod
    def token_grid(transformer: Any, inputs: Mapping[str, Any]) -> tuple[int, int, int] | None:
        if inputs.get("video_self_attention_mask") is not None:
            raise DenseOnlyError("the attention between the video and its references is masked, token by token")
        sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
        if None not in sizes:
            patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
            frames, height, width = sizes
            return frames // patch_t, height // patch, width // patch
        # Some pipelines give the coordinates of the tokens alone.
        if inputs.get("video_coords") is not None:
            return _first_grid(inputs["video_coords"][0].float().cpu())
        return None

    @staticmethod
    def timestep(inputs: Mapping[str, Any]) -> Any:
        # Conditioned tokens have smaller timesteps, or 0; the noise level is that of the step.
        sigma = inputs.get("sigma")
        return inputs.get("timestep") if sigma is None else sigma

    @classmethod
    def call(cls, arguments: Mapping[str, Any]) -> AttentionCall | None:
        perturbation = arguments.get("perturbation_mask")
        all_perturbed = arguments.get("all_perturbed")
        if all_perturbed is None and perturbation is not None:
            all_perturbed = (perturbation == 0).all()
        if all_perturbed:  # the values take the attention's place
            return None
        query_tables, key_tables = arguments.get("query_rotary_emb"), arguments.get("key_rotary_emb")
        mask = arguments.get("attention_mask")
        return AttentionCall(
            arguments["hidden_states"],
            None,
            # Given for each sample: `[B, 1 or N, N]`.
            None if mask is None else mask.reshape(len(mask), 1, -1, mask.shape[-1]),
            None if query_tables is None else (query_tables, query_tables if key_tables is None else key_tables),
            more=perturbation,
        )

    @staticmethod
    def project(attn: Any, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = call.hidden_states
        of_queries, of_keys = call.rotary_emb or (None, None)

        def placed(x: torch.Tensor, tables: Tables | None) -> torch.Tensor:
            return split_heads(attn, x if tables is None else _rotate(attn, x, tables))[0]

        return one_by_one(
            call,
            lambda: placed(attn.norm_q(attn.to_q(x)), of_queries),
            lambda: placed(attn.norm_k(attn.to_k(x)), of_keys),
            lambda: split_heads(attn, attn.to_v(x))[0],
        )

    @staticmethod
    def output(attn: Any, call: AttentionCall, video: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
        import torch

        if call.more is not None:
            # The values replace the attention of the samples where the mask is 0.
            (value,) = split_heads(attn, attn.to_v(call.hidden_states))
            video = torch.lerp(value, video, call.more[..., None])
        if attn.to_gate_logits is not None:
            # A gate for each token and head, 1 where its logit is 0.
            video = video * (2 * attn.to_gate_logits(call.hidden_states).sigmoid())[..., None]
        return project_out(attn, video)

    @staticmethod
    def video_readers(transformer: Any) -> tuple[torch.nn.Module, ...]:
        return tuple(block.video_to_audio_attn for block in transformer.transformer_blocks)

    @staticmethod
    def parallel_plan(transformer: Any) -> dict[str, Any]:
        # diffusers' own plan splits the text too, and of the positions only one form, and not those towards the sound.
        tables = split(1, 3, output=True) if transformer.config.rope_type == "interleaved" else split(2, 4, output=True)
        return {
            # Only pipelines with an image or conditions give each token a timestep of its own.
            "": {"hidden_states": split(1, 3), "timestep": split(1, 2)},
            "rope": {0: tables, 1: tables},
            "cross_attn_rope": {0: tables, 1: tables},
            "proj_out": gather(1, 3),
        }


_rotate_neighbours = Rotation(every_other)


def _rotate(attn: Any, x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate `[B, N, H * D]` by cosines and sines, whose form is the model's choice.

    Interleaved ones, `[B, N, H * D]`, turn neighbouring channels and hold each angle twice. Split ones,
    `[B, H, N, D / 2]`, turn the first half of a head's channels with its second half. Positions run through all heads.
    """
    if attn.rope_type == "interleaved":
        return _rotate_neighbours(tables, x)
    cos, sin = (table.transpose(1, 2) for table in tables)
    return rotate_halves(x.unflatten(-1, (attn.heads, -1)), cos, sin).flatten(-2)


def _first_grid(coordinates: torch.Tensor) -> tuple[int, int, int]:
    """Frames, height and width of the grid that the first tokens of a sequence form.

    Args:
        coordinates: `[3, N, 2]`: where each token begins and ends in time, rows and columns.
    """
    import torch

    begin, end = coordinates.unbind(-1)
    same_frame = begin[0] == begin[0, 0]
    same_row = same_frame & (begin[1] == begin[1, 0])
    size, width = _run_at_start(same_frame), _run_at_start(same_row)
    whole = coordinates.shape[1] // size * size
    begin, end = (x[:, :whole].unflatten(1, (-1, size)) for x in (begin, end))
    # A frame belongs to the grid if it has the rows and columns of the first one, and begins where the last one ends.
    alike = (begin[1:] == begin[1:, :1]).all(0).all(-1)
    one_time = (begin[0] == begin[0, :, :1]).all(-1)
    follows = torch.cat([torch.tensor([True]), begin[0, 1:, 0] == end[0, :-1, 0]])
    frames = _run_at_start(alike & one_time & follows)
    return frames, size // width, width


def _run_at_start(values: torch.Tensor) -> int:
    """How many of the first values are true without a gap."""
    return int(values.int().cumprod(0).sum())


# diffusers' `DEFAULT_NEGATIVE_PROMPT` of its `pipelines/ltx2/utils.py`, which its documentation gives to LTX-2.3.
_NEGATIVE_PROMPT = (
    "blurry, out of focus, overexposed, underexposed, low contrast, washed out colors, excessive noise, "
    "grainy texture, poor lighting, flickering, motion blur, distorted proportions, unnatural skin tones, "
    "deformed facial features, asymmetrical face, missing facial features, extra limbs, disfigured hands, "
    "wrong hand count, artifacts around text, inconsistent perspective, camera shake, incorrect depth of "
    "field, background too sharp, background clutter, distracting reflections, harsh shadows, inconsistent "
    "lighting direction, color banding, cartoonish rendering, 3D CGI look, unrealistic materials, uncanny "
    "valley effect, incorrect ethnicity, wrong gender, exaggerated expressions, wrong gaze direction, "
    "mismatched lip sync, silent or muted audio, distorted voice, robotic voice, echo, background noise, "
    "off-sync audio, incorrect dialogue, added dialogue, repetitive speech, jittery movement, awkward "
    "pauses, incorrect timing, unnatural transitions, inconsistent framing, tilted camera, flat lighting, "
    "inconsistent tone, cinematic oversaturation, stylized filters, or AI artifacts."
)
_KIND = PipelineKind(
    layers=(("num_layers", 48),),
    size_step=32,
    compression=(8, 32),
    patch=1,
    tiled_vae=True,
    sound=SoundOutput("vocoder.config.output_sampling_rate"),
    frame_rate="frame_rate",
)
_NO_OPTIONS = "which this command has no options for; patch it in Python with apply_psa(pipe)"
PIPELINES = {
    "LTX2Pipeline": _KIND,
    "LTX2ImageToVideoPipeline": replace(_KIND, image="first"),
    "LTX2ConditionPipeline": replace(_KIND, in_code_only=f"it takes conditions, {_NO_OPTIONS}"),
    "LTX2InContextPipeline": replace(_KIND, in_code_only=f"it takes references, {_NO_OPTIONS}"),
    "LTX2HDRPipeline": replace(_KIND, in_code_only=f"it takes a reference video, {_NO_OPTIONS}"),
    "LTX2DFRPipeline": replace(_KIND, in_code_only=f"it is one of several stages, {_NO_OPTIONS}"),
    "LTX2DFRTemporalRefinePipeline": replace(_KIND, in_code_only=f"it is one of several stages, {_NO_OPTIONS}"),
}
_20 = ModelCard(
    name="ltx2",
    hub_id="Lightricks/LTX-2",
    about="LTX-2 text to video with sound, 19B, 512 x 768 at 24 fps",
    pipeline="LTX2Pipeline",
    height=512,
    width=768,
    frames=121,
    steps=30,
    guidance=3.0,
    fps=24,
    negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
)
_23 = replace(
    _20,
    name="ltx2.3",
    hub_id="diffusers/LTX-2.3-Diffusers",
    about="LTX-2.3 text to video with sound, 22B, 512 x 768 at 24 fps",
    negative_prompt=_NEGATIVE_PROMPT,
)
_FROM_IMAGE = "LTX2ImageToVideoPipeline"
# diffusers' `DISTILLED_SIGMA_VALUES`, without guidance by the prompt, as its documentation runs the distilled model.
_DISTILLED = (
    ("sigmas", (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)),
    ("audio_guidance_scale", 1.0),
)
_25_ID = "Lightricks/LTX-2.5-Diffusers"
_25 = replace(
    _20,
    name="ltx2.5",
    hub_id=_25_ID,
    about="LTX-2.5 text to video with sound, 22B, distilled to 8 steps, 512 x 768 at 24 fps",
    steps=8,
    guidance=1.0,
    negative_prompt="",
    arguments=_DISTILLED,
)
CARDS = (
    _20,
    replace(
        _20,
        name="ltx2-i2v",
        about="LTX-2 image to video with sound, 19B, 512 x 768 at 24 fps (the same weights)",
        pipeline=_FROM_IMAGE,
    ),
    _23,
    replace(
        _23,
        name="ltx2.3-i2v",
        about="LTX-2.3 image to video with sound, 22B, 512 x 768 at 24 fps (the same weights)",
        pipeline=_FROM_IMAGE,
    ),
    _25,
    replace(
        _25,
        name="ltx2.5-i2v",
        about="LTX-2.5 image to video with sound, 22B, distilled to 8 steps, 512 x 768 (the same weights)",
        pipeline=_FROM_IMAGE,
    ),
    replace(
        _23,
        name="ltx2.5-full",
        hub_id=_25_ID,
        about="LTX-2.5 text to video with sound, 22B, not distilled, 512 x 768 at 24 fps",
        parts=(Part("transformer", "diffusers", "LTX2VideoTransformer3DModel", _25_ID, "transformer_full"),),
        scheduler=(("use_dynamic_shifting", True), ("shift_terminal", 0.1)),
    ),
)
