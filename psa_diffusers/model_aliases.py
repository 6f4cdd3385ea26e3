"""The models that `--model` knows by a short name, as data: where they are and how their cards say to run them."""

from dataclasses import dataclass, replace

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
    """A component of a pipeline that its card loads from another repository than the rest."""

    name: str
    library: str
    type: str
    repository: str
    subfolder: str = ""


@dataclass(frozen=True)
class ModelCard:
    """A model and the settings that its card runs it with.

    `hub_id` is None for the bundled demo. `guidance_2` is the guidance of Wan 2.2's low-noise expert (None: the model
    has no second expert, or its card gives none). `flow_shift` None keeps the scheduler that comes with the weights.
    Sizes are in pixels; an image-to-video model keeps the image's aspect ratio at the same area unless a size is given.
    `dtype` is what the weights were trained in. `parts` replace components of the repository.
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

    @property
    def transformer(self) -> tuple[str | None, str]:
        """The repository of the transformer, and the path of its configuration there."""
        for part in self.parts:
            if part.name == "transformer":
                return part.repository, f"{part.subfolder}/config.json".lstrip("/")
        return self.hub_id, "transformer/config.json"


HUNYUAN_VIDEO = {
    "height": 720,
    "width": 1280,
    "frames": 129,
    "steps": 50,
    "guidance": 6.0,
    "fps": 24,
    "negative_prompt": "",
}
HUNYUAN_VIDEO_1_5 = {**HUNYUAN_VIDEO, "frames": 121}
REDUX = "lllyasviel/flux_redux_bfl"
FRAMEPACK_PARTS = (
    Part("transformer", "diffusers", "HunyuanVideoFramepackTransformer3DModel", "lllyasviel/FramePackI2V_HY"),
    Part("feature_extractor", "transformers", "SiglipImageProcessor", REDUX, "feature_extractor"),
    Part("image_encoder", "transformers", "SiglipVisionModel", REDUX, "image_encoder"),
)
COGVIDEOX = {
    "height": 480,
    "width": 720,
    "frames": 49,
    "steps": 50,
    "guidance": 6.0,
    "fps": 8,
    "negative_prompt": "",
}
COGVIDEOX_1_5 = {**COGVIDEOX, "height": 768, "width": 1360, "frames": 81, "fps": 16}
LTX_VIDEO = {
    "height": 480,
    "width": 704,
    "frames": 161,
    "steps": 50,
    "guidance": 3.0,
    "fps": 24,
    "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
}
SKYREELS_V2 = {"height": 544, "width": 960, "frames": 97, "steps": 50, "fps": 24, "negative_prompt": ""}

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
        ModelCard(
            name="wan-vace-1.3b",
            hub_id="Wan-AI/Wan2.1-VACE-1.3B-diffusers",
            about="Wan 2.1 VACE text, or text and a reference image, to video, 1.3B, 480p",
            pipeline="WanVACEPipeline",
            flow_shift=3.0,
        ),
        ModelCard(
            name="wan-vace-14b",
            hub_id="Wan-AI/Wan2.1-VACE-14B-diffusers",
            about="Wan 2.1 VACE text, or text and a reference image, to video, 14B, 720p",
            pipeline="WanVACEPipeline",
            height=720,
            width=1280,
            flow_shift=5.0,
        ),
        ModelCard(
            name="hunyuanvideo",
            hub_id="hunyuanvideo-community/HunyuanVideo",
            about="HunyuanVideo text to video, 13B, 720p; its guidance is distilled",
            pipeline="HunyuanVideoPipeline",
            **HUNYUAN_VIDEO,
        ),
        ModelCard(
            name="hunyuanvideo-i2v",
            hub_id="hunyuanvideo-community/HunyuanVideo-I2V",
            about="HunyuanVideo image to video, 13B, 720p; its guidance is distilled",
            pipeline="HunyuanVideoImageToVideoPipeline",
            **HUNYUAN_VIDEO,
        ),
        ModelCard(
            name="hunyuanvideo-1.5-480p",
            hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
            about="HunyuanVideo 1.5 text to video, 8B, 480 x 848",
            pipeline="HunyuanVideo15Pipeline",
            **{**HUNYUAN_VIDEO_1_5, "height": 480, "width": 848},
        ),
        ModelCard(
            name="hunyuanvideo-1.5-720p",
            hub_id="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
            about="HunyuanVideo 1.5 text to video, 8B, 720p",
            pipeline="HunyuanVideo15Pipeline",
            **HUNYUAN_VIDEO_1_5,
        ),
        ModelCard(
            name="framepack",
            hub_id="hunyuanvideo-community/HunyuanVideo",
            about="HunyuanVideo Framepack image to video, 13B, in sections; transformer of lllyasviel/FramePackI2V_HY",
            pipeline="HunyuanVideoFramepackPipeline",
            height=832,
            width=480,
            frames=91,
            steps=30,
            guidance=9.0,
            fps=30,
            negative_prompt="",
            parts=FRAMEPACK_PARTS,
        ),
        ModelCard(
            name="cogvideox-2b",
            hub_id="zai-org/CogVideoX-2b",
            about="CogVideoX text to video, 2B, 480 x 720 at 8 fps",
            pipeline="CogVideoXPipeline",
            **COGVIDEOX,
            dtype="float16",
        ),
        ModelCard(
            name="cogvideox-5b",
            hub_id="zai-org/CogVideoX-5b",
            about="CogVideoX text to video, 5B, 480 x 720 at 8 fps",
            pipeline="CogVideoXPipeline",
            **COGVIDEOX,
        ),
        ModelCard(
            name="cogvideox-5b-i2v",
            hub_id="zai-org/CogVideoX-5b-I2V",
            about="CogVideoX image to video, 5B, 480 x 720 at 8 fps and no other size",
            pipeline="CogVideoXImageToVideoPipeline",
            **COGVIDEOX,
        ),
        ModelCard(
            name="cogvideox1.5-5b",
            hub_id="zai-org/CogVideoX1.5-5B",
            about="CogVideoX 1.5 text to video, 5B, 768 x 1360 at 16 fps",
            pipeline="CogVideoXPipeline",
            **COGVIDEOX_1_5,
        ),
        ModelCard(
            name="cogvideox1.5-5b-i2v",
            hub_id="zai-org/CogVideoX1.5-5B-I2V",
            about="CogVideoX 1.5 image to video, 5B, 768 x 1360 at 16 fps",
            pipeline="CogVideoXImageToVideoPipeline",
            **COGVIDEOX_1_5,
        ),
        ModelCard(
            name="ltx",
            hub_id="Lightricks/LTX-Video",
            about="LTX-Video text to video, 2B, 480 x 704 at 24 fps",
            pipeline="LTXPipeline",
            **LTX_VIDEO,
        ),
        ModelCard(
            name="ltx-i2v",
            hub_id="Lightricks/LTX-Video",
            about="LTX-Video image to video, 2B, 480 x 704 at 24 fps (the same weights)",
            pipeline="LTXImageToVideoPipeline",
            **LTX_VIDEO,
        ),
        ModelCard(
            name="mochi",
            hub_id="genmo/mochi-1-preview",
            about="Mochi 1 text to video, 10B, 480 x 848 at 30 fps",
            pipeline="MochiPipeline",
            height=480,
            width=848,
            frames=85,
            steps=64,
            guidance=4.5,
            fps=30,
            negative_prompt="",
        ),
        ModelCard(
            name="skyreels-v2",
            hub_id="Skywork/SkyReels-V2-T2V-14B-540P-Diffusers",
            about="SkyReels V2 text to video, 14B, 544 x 960 at 24 fps",
            pipeline="SkyReelsV2Pipeline",
            **SKYREELS_V2,
            guidance=6.0,
            flow_shift=8.0,
        ),
        ModelCard(
            name="skyreels-v2-i2v",
            hub_id="Skywork/SkyReels-V2-I2V-14B-540P-Diffusers",
            about="SkyReels V2 image to video, 14B, 544 x 960 at 24 fps",
            pipeline="SkyReelsV2ImageToVideoPipeline",
            **SKYREELS_V2,
            guidance=5.0,
            flow_shift=5.0,
        ),
        ModelCard(
            name="allegro",
            hub_id="rhymes-ai/Allegro",
            about="Allegro text to video, 3B, 720p at 15 fps",
            pipeline="AllegroPipeline",
            height=720,
            width=1280,
            frames=88,
            steps=100,
            guidance=7.5,
            fps=15,
            negative_prompt="",
        ),
    )
}


def card_for(source: str, pipeline: str) -> ModelCard:
    """The card of a hub id or a local folder.

    A known hub id, or a folder that carries the name of a known repository, has that model's settings. Any other model
    has no negative prompt and the settings of the first model here with the same pipeline; Wan's pipelines, which serve
    models of several sizes, have the defaults of diffusers.
    """
    repository = source.rstrip("/").rsplit("/", 1)[-1]
    cards = [card for card in MODELS.values() if card.pipeline == pipeline]
    for card in cards:
        if card.hub_id is not None and card.hub_id.endswith("/" + repository) and not card.parts:
            return card
    unknown = {"name": source, "hub_id": None, "about": "", "negative_prompt": "", "flow_shift": None, "parts": ()}
    if pipeline in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
        return ModelCard(**unknown, pipeline=pipeline)
    return replace(cards[0], **unknown)
