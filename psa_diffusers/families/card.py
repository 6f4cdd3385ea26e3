"""What a model's card says: where its weights are and how they are run."""

from dataclasses import dataclass
from typing import Any

# What Wan's own configuration (`sample_neg_prompt`, Wan 2.1 and 2.2 alike) and the Wan 2.2 cards use.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)

TEXT_TO_VIDEO = "WanPipeline"
IMAGE_TO_VIDEO = "WanImageToVideoPipeline"


@dataclass(frozen=True)
class Part:
    """A component of a pipeline, and where it is: a repository or a folder, with the branch of it that is not main.

    `variant` is the one of its weights that an index names, None for the plain ones.
    """

    name: str
    library: str
    type: str
    repository: str
    subfolder: str = ""
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """A model and the settings that its card runs it with.

    `hub_id` is None for the bundled demo. `revision` is the branch of it that holds the pipeline, if it is not main.
    `guidance_2` is the guidance of Wan 2.2's low-noise expert (None: the model has no second expert, or its card gives
    none). `flow_shift` None keeps the scheduler that comes with the weights.
    Sizes are in pixels; an image-to-video model keeps the image's aspect ratio at the same area unless a size is given.
    `dtype` is what the weights were trained in. `parts` replace components of the repository, `scheduler` settings of
    its scheduler, and `arguments` are what else the card calls the pipeline with: pairs of a name and a value.
    `min_tokens` stands in for `auto` in the preset's key of that name, for a model that shows quality, not speed.
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
    dtype: str = "bfloat16"
    parts: tuple[Part, ...] = ()
    revision: str | None = None
    scheduler: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    min_tokens: int | None = None

    @property
    def fixed_steps(self) -> bool:
        """Whether the card gives the noise level of each step, as of a distilled model."""
        return "sigmas" in dict(self.arguments)

    @property
    def transformer(self) -> tuple[str | None, str]:
        """The repository of the transformer, and the path of its configuration there."""
        for part in self.parts:
            if part.name == "transformer":
                return part.repository, f"{part.subfolder}/config.json".lstrip("/")
        return self.hub_id, "transformer/config.json"
