"""The models that `--model` knows by a short name, as data: where they are and how their cards say to run them."""

from dataclasses import dataclass

# What Wan's own configuration (`sample_neg_prompt`, Wan 2.1 and 2.2 alike) and the Wan 2.2 cards use.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

TEXT_TO_VIDEO = "WanPipeline"
IMAGE_TO_VIDEO = "WanImageToVideoPipeline"


@dataclass(frozen=True)
class ModelCard:
    """A model and the settings that its card runs it with.

    `hub_id` is None for the bundled demo. `guidance_2` is the guidance of Wan 2.2's low-noise expert (None: the model
    has no second expert, or its card gives none). `flow_shift` None keeps the scheduler that comes with the weights.
    Sizes are in pixels; an image-to-video model keeps the image's aspect ratio at the same area unless a size is given.
    """

    name: str
    hub_id: str | None
    about: str
    pipeline: str = TEXT_TO_VIDEO
    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    flow_shift: float | None = None
    fps: int = 16
    negative_prompt: str = WAN_NEGATIVE_PROMPT


MODELS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="demo",
            hub_id=None,
            about="bundled tiny Wan trained on moving shapes; offline, runs on a CPU",
            height=192,
            width=192,
            frames=33,
            steps=16,
            guidance=4.0,
            negative_prompt="",
        ),
        ModelCard(
            name="wan",
            hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            about="Wan 2.1 text to video, 1.3B, 480p",
            flow_shift=3.0,
        ),
        ModelCard(
            name="wan-14b",
            hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            about="Wan 2.1 text to video, 14B, 720p",
            height=720,
            width=1280,
            flow_shift=5.0,
        ),
        ModelCard(
            name="wan-i2v-14b-480p",
            hub_id="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            about="Wan 2.1 image to video, 14B, 480p",
            pipeline=IMAGE_TO_VIDEO,
            flow_shift=3.0,
        ),
        ModelCard(
            name="wan-i2v-14b-720p",
            hub_id="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            about="Wan 2.1 image to video, 14B, 720p",
            pipeline=IMAGE_TO_VIDEO,
            height=720,
            width=1280,
            flow_shift=5.0,
        ),
        ModelCard(
            name="wan2.2-14b",
            hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            about="Wan 2.2 text to video, two 14B experts, 720p",
            height=720,
            width=1280,
            steps=40,
            guidance=4.0,
            guidance_2=3.0,
        ),
        ModelCard(
            name="wan2.2-i2v-14b",
            hub_id="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            about="Wan 2.2 image to video, two 14B experts, 480p",
            pipeline=IMAGE_TO_VIDEO,
            steps=40,
            guidance=3.5,
        ),
        ModelCard(
            name="wan2.2-5b",
            hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            about="Wan 2.2 text to video, 5B, 720p at 24 fps",
            height=704,
            width=1280,
            frames=121,
            flow_shift=5.0,
            fps=24,
        ),
        ModelCard(
            name="wan2.2-i2v-5b",
            hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            about="Wan 2.2 image to video, 5B, 720p at 24 fps (the same weights)",
            pipeline=IMAGE_TO_VIDEO,
            height=704,
            width=1280,
            frames=121,
            flow_shift=5.0,
            fps=24,
        ),
    )
}


def card_for(source: str, pipeline: str) -> ModelCard:
    """The card of a hub id or a local folder.

    A known hub id, or a folder that carries the name of a known repository, has that model's settings; any other model
    has the defaults of diffusers' Wan pipelines and an empty negative prompt.
    """
    repository = source.rstrip("/").rsplit("/", 1)[-1]
    for card in MODELS.values():
        if card.hub_id is not None and card.hub_id.endswith("/" + repository) and card.pipeline == pipeline:
            return card
    return ModelCard(name=source, hub_id=None, about="", pipeline=pipeline, negative_prompt="")
