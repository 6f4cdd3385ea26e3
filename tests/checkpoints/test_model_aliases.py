"""What the models of `--model` run with, by their cards and the published configurations of their checkpoints."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from psa_diffusers.checkpoints import configurations, resolve
from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.families import FAMILIES, MODULES
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request
from psa_testing.families import PUBLISHED
from psa_testing.tiny_pipelines import tiny_image


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: every repository has these files, at first of a Wan 2.2 model with two experts."""
    files: dict = {
        "revisions": [],
        "model_index.json": {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]},
        "vae/config.json": {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
        "transformer/config.json": {"patch_size": [1, 2, 2], "num_layers": 40},
    }

    def fetch(repository, file, revision):
        files["revisions"].append(revision)
        path = tmp_path / file.replace("/", "-")
        path.write_text(json.dumps(files[file]))
        return path

    monkeypatch.setattr(configurations, "_from_hub", fetch)
    monkeypatch.setattr(resolve, "is_installed", lambda package: True)
    return files


CHECKPOINTS = {published.checkpoint: published for published in PUBLISHED}


def test_every_alias_has_a_name_of_its_own():
    names = [card.name for module in MODULES for card in module.CARDS]
    assert len(MODELS) == 1 + len(names) == 1 + len({*names, "demo"} - {"demo"})
    assert next(iter(MODELS)) == "demo"
    assert {card.pipeline for card in MODELS.values()} == set(PIPELINE_KINDS)


def test_the_tables_in_the_docs_name_every_model():
    root = Path(__file__).resolve().parents[2]
    readme, docs = (root.joinpath(file).read_text(encoding="utf-8") for file in ("README.md", "docs/models.md"))
    assert [name for name in MODELS if f"`{name}`" not in readme] == []
    assert [name for name in MODELS if f"`{name}`" not in docs] == ["demo"]
    assert [family.name for family in FAMILIES if f"| {family.name} |" not in docs] == []
    assert [name for family in FAMILIES for name in family.transformers if f"`{name}`" not in docs] == []


@pytest.mark.parametrize("name", [name for name, card in MODELS.items() if card.hub_id])
def test_every_alias_passes_its_own_checks(name, hub, tmp_path):
    """With the published configuration of its checkpoint, and the size whose token grid is known."""
    card, published = MODELS[name], CHECKPOINTS[MODELS[name].transformer[0]]
    hub[card.transformer[1]] = published.config
    hub["vae/config.json"] = published.vae
    hub["model_index.json"]["transformer_2"] = ["diffusers", "X"] if published.experts == 2 else [None, None]
    hub["modular_model_index.json"] = {
        part: ["diffusers", "X", {"pretrained_model_name_or_path": card.hub_id, "subfolder": part}]
        for part in ("transformer", "vae")
    }
    tiny_image(card.width, card.height).save(tmp_path / "image.png")
    image = str(tmp_path / "image.png") if PIPELINE_KINDS[card.pipeline].takes_image else None
    plan = make_plan(Request(prompts=("a cat",), model=name, image=image))
    settings, model = plan.settings, plan.model
    assert (settings.source, settings.steps, settings.fps) == (card.hub_id, card.steps, card.fps)
    assert settings.negative_prompt == card.negative_prompt
    assert settings.negative_prompt.startswith("色调艳丽") == (name.startswith("wan"))
    assert (model.num_layers, model.experts) == (published.layers, published.experts)
    frames, height, width = published.grid
    assert (settings.height // model.size_step, settings.width // model.size_step) == (height, width)
    if name == "minimax-h3":  # its VAE makes several latents of a number of frames
        from diffusers.modular_pipelines.minimax_h3.modular_pipeline import video_latent_num_frames

        assert video_latent_num_frames(settings.frames, model.frame_step, 5) == frames
    elif not model.kind.any_frames:  # else its grid is that of a section
        latents = -(-settings.frames // model.frame_step)
        assert -(-latents // published.config.get("patch_size_t", 1)) == frames
    if name == "wan2.2-14b":
        assert (settings.guidance, settings.guidance_2) == (4.0, 3.0)


def test_a_model_that_needs_more_than_the_command_can_give(hub):
    hub["model_index.json"]["_class_name"] = "WanAnimatePipeline"
    with pytest.raises(InputError, match=r"it is a WanAnimatePipeline: it needs a video of a pose .* apply_psa"):
        resolve_model("Wan-AI/Wan2.2-Animate-14B-Diffusers")


def test_a_pipeline_that_needs_other_packages(hub, monkeypatch):
    monkeypatch.setattr(resolve, "is_installed", lambda package: package != "cosmos_guardrail")
    message = (
        "^--model cosmos-7b: CosmosTextToWorldPipeline needs the package cosmos_guardrail, which is not installed; "
        r"pip install 'psa-diffusers\[cosmos\]'$"
    )
    with pytest.raises(InputError, match=message):
        resolve_model("cosmos-7b")


def test_packages_are_looked_for_without_being_imported():
    assert resolve.is_installed("tabnanny") and not resolve.is_installed("no_such_package")


def test_a_pipeline_in_a_branch_of_its_repository(hub, tmp_path):
    hub["transformer/config.json"] = CHECKPOINTS["nvidia/Cosmos-Predict2.5-2B"].config
    hub["model_index.json"]["_class_name"] = "Cosmos2_5_PredictBasePipeline"
    branch = MODELS["cosmos2.5-2b"].revision
    for name, expected in (
        ("cosmos2.5-2b", branch),
        ("nvidia/Cosmos-Predict2.5-2B", branch),
        ("someone/Cosmos-Predict2.5-2B", None),
        ("someone/other", None),
    ):
        hub["revisions"].clear()
        assert resolve_model(name).card.revision == expected
        assert hub["revisions"] == [expected] * 3


def test_an_image_that_a_model_may_begin_with(hub, tmp_path):
    """Without one it makes a video from words alone; with one it has that one's shape."""
    hub["transformer/config.json"] = CHECKPOINTS["nvidia/Cosmos-Predict2.5-2B"].config
    tiny_image(400, 400).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="cosmos2.5-2b")
    plan = make_plan(request)
    assert plan.image is None and (plan.settings.height, plan.settings.width) == (704, 1280)
    plan = make_plan(replace(request, image=str(tmp_path / "image.png")))
    assert (plan.settings.height, plan.settings.width) == (944, 944) and plan.image.size == (944, 944)


def test_frames_that_are_no_multiple(hub):
    hub["transformer/config.json"], hub["vae/config.json"] = CHECKPOINTS["rhymes-ai/Allegro"].config, {}
    with pytest.raises(InputError, match="--frames 81: must be a multiple of 4, such as 80 or 84"):
        make_plan(Request(prompts=("a cat",), model="allegro", frames=81))


def test_a_reference_image_is_optional_and_stays_as_it_is(hub, tmp_path):
    hub["transformer/config.json"] = CHECKPOINTS["Wan-AI/Wan2.1-VACE-1.3B-diffusers"].config
    tiny_image(320, 100).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="wan-vace-1.3b")
    assert make_plan(request).image is None
    plan = make_plan(replace(request, image=str(tmp_path / "image.png")))
    assert (plan.image.size, plan.settings.height, plan.settings.width) == ((320, 100), 480, 832)


def test_a_model_that_makes_one_size_only(hub, tmp_path):
    hub["transformer/config.json"] = CHECKPOINTS["zai-org/CogVideoX-5b-I2V"].config
    tiny_image(320, 180).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="cogvideox-5b-i2v", image=str(tmp_path / "image.png"))
    plan = make_plan(request)
    assert (plan.settings.height, plan.settings.width) == (480, 720) and plan.image.size == (720, 480)
    with pytest.raises(InputError, match=r"--height 480 --width 832: .* makes videos of 480 x 720 only"):
        make_plan(replace(request, width=832))


def test_a_model_that_makes_one_number_of_frames(hub, tmp_path):
    hub["transformer/config.json"] = CHECKPOINTS["nvidia/ChronoEdit-14B-Diffusers"].config
    tiny_image(128, 72).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="chronoedit", image=str(tmp_path / "image.png"))
    assert make_plan(request).settings.frames == 5
    with pytest.raises(InputError, match=r"^--frames 81: chronoedit makes 5 frames, and no other number$"):
        make_plan(replace(request, frames=81))


def test_a_model_whose_size_is_that_of_its_image(hub, tmp_path):
    """The pipeline takes the image as it is, and no size."""
    published = CHECKPOINTS["hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"]
    hub["transformer/config.json"], hub["vae/config.json"] = published.config, published.vae
    tiny_image(320, 320).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="hunyuanvideo-1.5-i2v-480p", image=str(tmp_path / "image.png"))
    plan = make_plan(request)
    assert (plan.settings.height, plan.settings.width) == (640, 640) and plan.image.size == (320, 320)
    assert make_plan(replace(request, height=640)).settings == plan.settings
    assert pickle.loads(pickle.dumps(plan)).model.image_size(72, 128) == (480, 848)  # as other processes get it
    message = "^--height 480 --width 640: hunyuanvideo-1.5-i2v-480p makes 640 x 640 of this image, and no other size$"
    with pytest.raises(InputError, match=message):
        make_plan(replace(request, height=480))
    hub["transformer/config.json"] = {**published.config, "target_size": "640"}
    with pytest.raises(InputError, match=r"transformer/config\.json is damaged"):
        make_plan(request)


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("LucyEditPipeline", "it edits a video"),
        ("ConsisIDPipeline", "it needs what face models make of an image"),
        ("EasyAnimateInpaintPipeline", "it needs a video and a mask"),
        ("EasyAnimateControlPipeline", "it needs a video of a control signal"),
    ],
)
def test_a_pipeline_for_code_only_says_why(hub, pipeline, why):
    hub["model_index.json"]["_class_name"] = pipeline
    with pytest.raises(InputError, match=rf"it is a {pipeline}: {why}, which .* apply_psa\(pipe\)"):
        resolve_model("someone/something")


def test_a_model_has_the_dtype_that_its_card_names(hub, monkeypatch):
    monkeypatch.setattr("psa_diffusers.runs.plan._pick_device", lambda *_: "cuda")
    dtypes = {
        name: make_plan(Request(prompts=("a cat",), model=name)).settings.dtype
        for name in ("cogvideox-2b", "wan", "mochi")
    }
    assert dtypes == {"cogvideox-2b": "float16", "wan": "bfloat16", "mochi": "bfloat16"}


def test_an_unknown_checkpoint_has_the_settings_of_its_pipeline(tmp_path, hub):
    hub["model_index.json"]["_class_name"] = "LTXPipeline"
    card = resolve_model("someone/some-ltx").card
    assert (card.height, card.width, card.frames, card.fps) == (480, 704, 161, 24)
    assert (card.name, card.hub_id, card.negative_prompt) == ("someone/some-ltx", None, "")


def test_one_guidance_given_goes_to_both_experts(hub):
    settings = make_plan(Request(prompts=("a cat",), model="wan2.2-14b", guidance=6.0, preset="dense")).settings
    assert (settings.guidance, settings.guidance_2) == (6.0, None)
