"""What `--model` names, what is refused before weights load, and where a loaded pipeline stands."""

from dataclasses import replace

import diffusers
import pytest
import torch
import transformers

from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.checkpoints.load import current_flow_shift, load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.families.card import IMAGE_TO_VIDEO, Part


def test_a_local_folder_tells_its_own_limits(saved):
    model = resolve_model(str(saved / "wan"))
    assert (model.size_step, model.frame_step, model.num_layers, model.experts) == (16, 4, 2, 1)
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
    with pytest.raises(InputError, match=r"--model wan14b: no such model \(did you mean wan-14b\?\); allowed: demo, "):
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


def test_a_whole_model_comes_from_its_branch(saved, monkeypatch):
    model = resolve_model(str(saved / "wan"))
    seen = {}

    def watch(kind):
        original = kind.from_pretrained.__func__

        def from_pretrained(cls, *arguments, **settings):
            seen[cls.__name__] = settings.get("revision")
            return original(cls, *arguments, **settings)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(from_pretrained))

    kinds = (diffusers.WanPipeline, diffusers.WanTransformer3DModel, transformers.UMT5EncoderModel)
    for kind in kinds:
        watch(kind)
    for revision in ("a/branch", None):
        seen.clear()
        branch = replace(model, card=replace(model.card, revision=revision))
        load_pipeline(branch, dtype="float32", device="cpu", offload="none")
        assert seen == {kind.__name__: revision for kind in kinds}


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
