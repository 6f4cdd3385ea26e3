"""What `--model` names, what is checked before weights load, and where a loaded pipeline stands."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from published_models import PUBLISHED
from tiny_pipelines import tiny_image, tiny_wan, tiny_wan_expanded, tiny_wan_i2v

from psa_diffusers import pipelines
from psa_diffusers.errors import InputError
from psa_diffusers.model_aliases import IMAGE_TO_VIDEO, MODELS, Part
from psa_diffusers.pipeline_kinds import PIPELINE_KINDS
from psa_diffusers.pipelines import current_flow_shift, load_pipeline, resolve_model
from psa_diffusers.prompts import read_prompts, slug
from psa_diffusers.settings import Request, make_plan


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of saved tiny pipelines by name."""
    folder = tmp_path_factory.mktemp("models")
    builders = {"wan": tiny_wan, "experts": lambda: tiny_wan(two_stage=True), "i2v": tiny_wan_i2v}
    for name, build in {**builders, "expanded": tiny_wan_expanded}.items():
        build().save_pretrained(folder / name)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stands in for the hub: every repository has these files, at first of a Wan 2.2 model with two experts."""
    files = {
        "model_index.json": {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]},
        "vae/config.json": {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
        "transformer/config.json": {"patch_size": [1, 2, 2], "num_layers": 40},
    }

    def fetch(repository, file):
        path = tmp_path / file.replace("/", "-")
        path.write_text(json.dumps(files[file]))
        return path

    monkeypatch.setattr(pipelines, "_from_hub", fetch)
    return files


def tiny_request(folder, **changes) -> Request:
    small = Request(prompts=("a cat",), model=str(folder), height=64, width=64, frames=9, steps=2, preset="dense")
    return replace(small, **changes)


def test_a_local_folder_tells_its_own_limits(saved):
    model = resolve_model(str(saved / "wan"))
    assert (model.size_step, model.frame_step, model.num_layers, model.experts) == (16, 4, 4, 1)
    assert not model.takes_image
    assert resolve_model(str(saved / "experts")).experts == 2
    assert resolve_model(str(saved / "i2v")).takes_image


def test_a_folder_named_as_a_known_repository_has_its_card(saved, tmp_path):
    (tmp_path / "Wan2.1-T2V-14B-Diffusers").symlink_to(saved / "wan")
    card = resolve_model(str(tmp_path / "Wan2.1-T2V-14B-Diffusers")).card
    assert card.name == str(saved / "wan")  # the link leads to a folder of another name
    (saved / "wan").rename(saved / "Wan2.1-T2V-14B-Diffusers")
    try:
        assert resolve_model(str(saved / "Wan2.1-T2V-14B-Diffusers")).card is MODELS["wan-14b"]
    finally:
        (saved / "Wan2.1-T2V-14B-Diffusers").rename(saved / "wan")


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(InputError, match=r"--model wan14b: no such model; did you mean wan-14b\?"):
        resolve_model("wan14b")


def test_what_is_no_supported_pipeline_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no model_index\.json there"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match=r"it is a FluxPipeline; supported are WanPipeline, .*MochiPipeline"):
        resolve_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{broken")
    with pytest.raises(InputError, match=r"cannot read model_index\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["wan", "someone/some-wan"])
def test_offline_and_not_cached_is_said_plainly(name, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set and the model is not in the local cache"):
        resolve_model(name)


CHECKPOINTS = {published.checkpoint: published for published in PUBLISHED}
# What the configurations of their VAEs say of compression; LTX's and Mochi's say nothing.
VAES = {
    "Wan": {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
    "SkyReels": {"scale_factor_spatial": 8, "scale_factor_temporal": 4},
    "HunyuanVideo15": {"spatial_compression_ratio": 16, "temporal_compression_ratio": 4},
    "Hunyuan": {"spatial_compression_ratio": 8, "temporal_compression_ratio": 4},
    "Allegro": {},
    "CogVideoX": {"temporal_compression_ratio": 4},
}


@pytest.mark.parametrize("name", [name for name, card in MODELS.items() if card.hub_id])
def test_every_alias_passes_its_own_checks(name, hub, tmp_path):
    """With the published configuration of its checkpoint, and the size whose token grid is known."""
    card, published = MODELS[name], CHECKPOINTS[MODELS[name].transformer[0]]
    hub[card.transformer[1]] = published.config
    hub["vae/config.json"] = next((vae for kind, vae in VAES.items() if card.pipeline.startswith(kind)), {})
    if "2.2" in name and "5b" in name:
        hub["vae/config.json"] = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    two = name in ("wan2.2-14b", "wan2.2-i2v-14b")
    hub["model_index.json"]["transformer_2"] = ["diffusers", "X"] if two else [None, None]
    tiny_image(card.width, card.height).save(tmp_path / "image.png")
    image = str(tmp_path / "image.png") if PIPELINE_KINDS[card.pipeline].takes_image else None
    plan = make_plan(Request(prompts=("a cat",), model=name, image=image))
    settings, model = plan.settings, plan.model
    assert (settings.source, settings.steps, settings.fps) == (card.hub_id, card.steps, card.fps)
    assert settings.negative_prompt == card.negative_prompt
    assert settings.negative_prompt.startswith("色调艳丽") == (name.startswith("wan"))
    assert (model.num_layers, model.experts) == (published.layers, 1 + two)
    frames, height, width = published.grid
    assert (settings.height // model.size_step, settings.width // model.size_step) == (height, width)
    if name != "framepack":  # its grid is that of a section
        latents = -(-settings.frames // model.frame_step)
        assert -(-latents // published.config.get("patch_size_t", 1)) == frames
    if name == "wan2.2-14b":
        assert (settings.guidance, settings.guidance_2) == (4.0, 3.0)


def test_a_model_that_needs_more_than_the_command_can_give(hub):
    hub["model_index.json"]["_class_name"] = "WanAnimatePipeline"
    with pytest.raises(InputError, match=r"it is a WanAnimatePipeline: it needs a video of a pose .* apply_psa"):
        resolve_model("Wan-AI/Wan2.2-Animate-14B-Diffusers")


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


def test_components_from_other_repositories(saved, monkeypatch):
    """Framepack's transformer and image encoder are not in the repository of the rest."""
    card = resolve_model(str(saved / "wan")).card
    part = Part("transformer", "diffusers", "WanTransformer3DModel", str(saved / "experts"), "transformer_2")
    model = replace(resolve_model(str(saved / "wan")), card=replace(card, parts=(part,)))
    seen = []
    original = diffusers.WanTransformer3DModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **settings):
        seen.append((arguments, settings.get("subfolder")))
        return original(cls, *arguments, **settings)

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "from_pretrained", classmethod(from_pretrained))
    pipe = load_pipeline(model, dtype="bfloat16", device="cpu", offload="none")
    assert pipe.transformer.dtype == torch.bfloat16
    assert seen == [((str(saved / "experts"),), "transformer_2")]


def test_a_model_that_makes_one_size_only(hub, tmp_path):
    hub["transformer/config.json"] = CHECKPOINTS["zai-org/CogVideoX-5b-I2V"].config
    tiny_image(320, 180).save(tmp_path / "image.png")
    request = Request(prompts=("a cat",), model="cogvideox-5b-i2v", image=str(tmp_path / "image.png"))
    plan = make_plan(request)
    assert (plan.settings.height, plan.settings.width) == (480, 720) and plan.image.size == (720, 480)
    with pytest.raises(InputError, match=r"--height 480 --width 832: .* makes videos of 480 x 720 only"):
        make_plan(replace(request, width=832))


def test_a_model_has_the_dtype_that_its_card_names(hub, monkeypatch):
    monkeypatch.setattr("psa_diffusers.settings._pick_device", lambda *_: "cuda")
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 10}, r"--frames 10: must be 4k\+1, such as 9 or 13"),
        ({"frames": 0}, r"--frames 0: must be 4k\+1, such as 1 or 5"),
        ({"height": 70}, r"--height 70: .* needs a multiple of 16, such as 64 or 80"),
        ({"width": 8}, r"--width 8: .* needs a multiple of 16, such as 16"),
        ({"steps": 0}, r"--steps 0: must be from 1 to 1000"),
        ({"guidance": float("nan")}, r"--guidance nan: must be from 0.0 to 100.0"),
        ({"seed": -1}, r"--seed -1: must be from 0 to"),
        ({"fps": 0}, r"--fps 0: must be from 1 to 240"),
        ({"dtype": "int8"}, r"--dtype int8: must be one of auto, bfloat16, float16, float32"),
        ({"offload": "disk"}, r"--offload disk: must be one of none, model, group"),
        ({"offload": "model", "device": "cpu"}, r"--offload model: needs a CUDA device, and the run is on cpu"),
        ({"device": "tpu9"}, r"--device tpu9: not a device"),
        ({"device": "meta"}, r"--device meta: not supported"),
        ({"device": "cuda:99"}, r"--device cuda:99: this machine has \d+ CUDA devices"),
        ({"image": "cat.png"}, r"--image: .* makes a video from words alone; .*wan-i2v-14b-480p"),
        ({"compare": True}, r"--compare needs a sparse --preset"),
        ({"preset": "psa-33"}, r"--preset .*psa-33.*did you mean psa-3\?"),
        ({"prompts": ()}, r"no prompt given"),
        ({"prompts": (" ",)}, r"a prompt is empty"),
        ({"prompts": ("missing.txt",)}, r"prompt file missing.txt: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(saved, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        make_plan(tiny_request(saved / "wan", **changes))
    assert "\n" not in str(caught.value)


def test_a_preset_rule_for_a_layer_that_the_model_lacks(saved, tmp_path):
    (tmp_path / "deep.yaml").write_text("layers: [{match: 30, dense: true}]")
    with pytest.raises(InputError, match=r"deep\.yaml.*30"):
        make_plan(tiny_request(saved / "wan", preset=str(tmp_path / "deep.yaml")))


def test_an_image_model_needs_an_image_that_opens(saved, tmp_path):
    with pytest.raises(InputError, match="makes a video from an image; give --image FILE"):
        make_plan(tiny_request(saved / "i2v"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError, match=r"broken\.png: cannot be read as an image"):
        make_plan(tiny_request(saved / "i2v", image=str(tmp_path / "broken.png")))


def test_an_image_gives_the_aspect_ratio_unless_a_size_is_given(saved, tmp_path):
    tiny_image(300, 100).save(tmp_path / "wide.png")
    plan = make_plan(tiny_request(saved / "i2v", image=str(tmp_path / "wide.png"), height=None, width=None))
    assert (plan.settings.height, plan.settings.width) == (352, 1088)
    assert plan.image.size == (1088, 352)
    plan = make_plan(tiny_request(saved / "i2v", image=str(tmp_path / "wide.png")))
    assert plan.image.size == (64, 64)


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\n\n  a cat  \n# another\na dog, at night\r\n", encoding="utf-8")
    assert read_prompts(("first", str(path), "last")) == ("first", "a cat", "a dog, at night", "last")
    path.write_text("# only a comment\n\n")
    with pytest.raises(InputError, match="no prompt in it"):
        read_prompts((str(path),))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_prompts((str(path),))
    assert len(read_prompts(("word " * 200,))[0]) == 999  # longer than a file name may be


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("🎉🎉", "prompt"),
        ("", "prompt"),
        ("..", "prompt"),
        ("Ein Kätzchen, 3.5 m/s!", "ein-katzchen-3.5-m-s"),
        ("wan2.2-14b", "wan2.2-14b"),
        ("一只猫 cat", "cat"),
        ("<script>alert(1)</script>", "script-alert-1-script"),
        ("con\x00\n\ttrol", "con-trol"),
    ],
)
def test_slugs_are_safe(prompt, expected):
    assert slug(prompt) == expected


def test_a_long_slug_is_cut():
    assert len(slug("x" * 300)) <= 48
    assert not slug("ab " * 100).endswith("-")


def test_equal_runs_share_a_default_folder_and_others_do_not(saved):
    first = make_plan(tiny_request(saved / "wan")).output
    assert first == make_plan(tiny_request(saved / "wan")).output
    assert first != make_plan(tiny_request(saved / "wan", seed=1)).output
    assert first != make_plan(tiny_request(saved / "wan", prompts=("a cat", "a dog"))).output


def test_loading_sets_dtype_and_shift_and_keeps_the_vae_exact(saved):
    model = resolve_model(str(saved / "experts"))
    pipe = load_pipeline(model, dtype="bfloat16", device="cpu", offload="none", flow_shift=9.0)
    assert pipe.transformer.dtype == pipe.transformer_2.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32
    assert current_flow_shift(pipe) == 9.0
    euler = load_pipeline(resolve_model(str(saved / "wan")), dtype="float32", device="cpu", offload="none")
    assert current_flow_shift(euler) == 7.0


def test_one_repository_serves_text_and_image_to_video(saved):
    model = resolve_model(str(saved / "expanded"))
    model = replace(model, card=replace(model.card, pipeline=IMAGE_TO_VIDEO))
    pipe = load_pipeline(model, dtype="float32", device="cpu", offload="none")
    assert type(pipe).__name__ == IMAGE_TO_VIDEO
    assert pipe.config.expand_timesteps


def test_weights_that_are_missing_or_pickled_are_refused(saved, tmp_path):
    import shutil

    shutil.copytree(saved / "wan", tmp_path / "wan")
    weights = tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"cannot be loaded: .*safetensors"):
        load_pipeline(resolve_model(str(tmp_path / "wan")), dtype="float32", device="cpu", offload="none")


def test_the_bundled_demo_needs_nothing_but_a_prompt():
    plan = make_plan(Request(prompts=("a red circle",), device="cpu"))
    settings = plan.settings
    assert (settings.source, settings.frames, settings.height, settings.width) == ("bundled", 33, 192, 192)
    assert settings.preset == "psa-3"
    assert plan.model.experts == 1 and not plan.model.takes_image
