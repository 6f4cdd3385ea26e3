"""Models that exist only as modular pipelines: found, checked before weights load, loaded whole."""

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np
import pytest
import torch
from diffusers import WanModularPipeline
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from safetensors.torch import load_file, save_file

from psa_diffusers.checkpoints import configurations, modular
from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_testing.lora_files import save_lora
from psa_testing.modular_wan import COMPONENTS, KIND, save_modular_wan

INDEX = "modular_model_index.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modular") / "wan"
    save_modular_wan(folder)
    return folder


@pytest.fixture
def model(original, tmp_path, monkeypatch):
    """A copy, whose index still names the original's place."""
    monkeypatch.setitem(PIPELINE_KINDS, "WanModularPipeline", KIND)
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def load(folder, **settings):
    return load_pipeline(resolve_model(str(folder)), dtype="float32", device="cpu", offload="none", **settings)


def change(folder, name, entry):
    index = json.loads((folder / INDEX).read_text())
    entry = entry(index[name]) if callable(entry) else entry
    (folder / INDEX).write_text(json.dumps({**index, name: entry}))


def test_it_is_found_by_its_index_and_its_configurations_are_read(model):
    found = resolve_model(str(model))
    assert (found.card.pipeline, found.num_layers, found.num_heads, found.experts) == ("WanModularPipeline", 2, 2, 1)
    assert (found.size_step, found.frame_step) == (16, 4)


def test_it_is_loaded_from_its_own_folder(model, original):
    weights = load_file(model / WEIGHTS)
    weights["proj_out.bias"] += 1
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    pipe = load(model)
    assert type(pipe) is WanModularPipeline
    assert all(getattr(pipe, name) is not None for name in (*COMPONENTS, "guider", "video_processor"))
    assert torch.equal(pipe.transformer.proj_out.bias, weights["proj_out.bias"])
    # What the copy does not hold is where the index says.
    shutil.rmtree(model / "vae")
    assert load(model).vae is not None


def test_settings_of_the_index_are_kept_and_code_of_a_repository_is_not_looked_for(model, tmp_path):
    (model / "block.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'touched')!r}).touch()\n")
    auto_map = {"ModularPipelineBlocks": "block.Blocks"}
    (model / "modular_config.json").write_text(json.dumps({"auto_map": auto_map}))
    change(model, "_blocks_class_name", "Blocks")
    change(model, "auto_map", auto_map)
    assert type(load(model).blocks).__name__ == "WanBlocks"
    assert not (tmp_path / "touched").exists()


def test_lora_and_flow_shift(model, tmp_path):
    from psa_diffusers.checkpoints.lora import resolve_loras

    file = save_lora(tmp_path / "style.safetensors")
    loras = resolve_loras([f"{file}:0.5"], [], model="wan", pipeline="WanModularPipeline", experts=1)
    pipe = load(model, loras=loras, flow_shift=2.0)
    assert pipe.transformer.blocks[0].attn1.to_q.scaling == {"style_1": 0.5}
    assert pipe.scheduler.config.shift == 2.0


def without_block(folder):
    weights = {name: value for name, value in load_file(folder / WEIGHTS).items() if "blocks.1." not in name}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def nowhere(folder, name):
    shutil.rmtree(folder / name)
    change(folder, name, [None, None, {}])


DAMAGES = {
    "weights missing": (without_block, r"transformer: its weights lack blocks\.1\."),
    "a class that is not there": (
        lambda folder: change(folder, "scheduler", lambda entry: ["diffusers", "NoSuch", entry[2]]),
        r"scheduler is a NoSuch, which diffusers \S+ does not have",
    ),
    "a library that is not taken": (
        lambda folder: change(folder, "scheduler", lambda entry: ["subprocess", "Popen", entry[2]]),
        r"modular_model_index\.json: scheduler is of subprocess; allowed are diffusers and transformers",
    ),
    "a component taken out": (
        lambda folder: change(folder, "tokenizer", None),
        r"modular_model_index\.json has no tokenizer",
    ),
    "a component that is nowhere": (
        lambda folder: nowhere(folder, "tokenizer"),
        r"modular_model_index\.json has no tokenizer",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_when_it_loads(name, model):
    damage, message = DAMAGES[name]
    damage(model)
    with pytest.raises(InputError, match=rf"^--model {model}: cannot be loaded: {message}") as caught:
        load(model)
    assert "\n" not in str(caught.value)


REFUSED_AT_ONCE = {
    "no transformer": (lambda folder: change(folder, "transformer", None), "modular_model_index.json has no transf"),
    "an entry that is none": (
        lambda folder: change(folder, "vae", ["diffusers", 3, {"subfolder": "vae"}]),
        r"modular_model_index.json: vae is \['diffusers', 3, .*; it must be a library, a class and where it is",
    ),
    "another pipeline": (lambda folder: change(folder, "_class_name", "WanPipeline"), "it is a WanPipeline; supported"),
    "no index": (lambda folder: (folder / INDEX).unlink(), r"no model_index\.json there"),
    "broken": (lambda folder: (folder / INDEX).write_text("{"), r"cannot read modular_model_index\.json"),
}


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_damage_that_the_index_shows_is_told_before_anything_loads(name, model):
    damage, message = REFUSED_AT_ONCE[name]
    damage(model)
    with pytest.raises(InputError, match=rf"^--model {model}: {message}"):
        resolve_model(str(model))


def test_an_index_of_the_other_kind_does_not_make_it_modular(model):
    (model / INDEX).rename(model / "model_index.json")
    with pytest.raises(InputError, match="it is a WanModularPipeline; supported are"):
        resolve_model(str(model))


def test_a_repository_that_has_only_a_modular_index(model, monkeypatch):
    def fetch(repository, file, revision):
        if repository == "someone/wan" and file == "model_index.json":
            raise InputError(f"--model {repository}: it has no {file}, so it is not a saved pipeline")
        return model / file

    monkeypatch.setattr(configurations, "_from_hub", fetch)
    assert resolve_model("someone/wan").card.pipeline == "WanModularPipeline"
    (model / INDEX).write_text(json.dumps({"_class_name": "Other"}))
    with pytest.raises(InputError, match="it is a Other; supported are"):
        resolve_model("someone/wan")
    (model / INDEX).write_text("{")
    with pytest.raises(InputError, match=r"it has no model_index\.json, so it is not a saved pipeline"):
        resolve_model("someone/wan")


def test_only_the_components_of_some_workflows_are_loaded(model, monkeypatch):
    """Wan's blocks have no workflows; they are given one that ends before decoding."""
    from diffusers import WanBlocks

    def get_workflow(blocks, name):
        assert name == "latents"
        return blocks.sub_blocks["denoise"]

    monkeypatch.setattr(WanBlocks, "get_workflow", get_workflow)
    monkeypatch.setitem(PIPELINE_KINDS, "WanModularPipeline", replace(KIND, workflows=("latents",)))
    pipe = load(model)
    assert pipe.transformer is not None and pipe.scheduler is not None
    assert pipe.vae is None and pipe.text_encoder is None


CALL = {"prompt": "a cat", "negative_prompt": "", "num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 2}


def frames(pipe):
    modular.set_progress_bars(pipe, disable=True)
    return pipe(**CALL, generator=torch.Generator().manual_seed(0), output="videos")[0]


@pytest.fixture
def offloaded(model, monkeypatch, one_thread):
    """A pipeline that is offloaded in a way, from a CPU to itself, and the frames of one that is not."""
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda index: (2**30, 2**31), raising=False)
    monkeypatch.setitem(modular.OFFLOADS, "use_stream", False)

    def make(offload):
        pipe = load_pipeline(resolve_model(str(model)), dtype="float32", device="cpu", offload=offload)
        return pipe, frames(load(model))

    return make


def test_offload_of_models_has_one_on_the_device(offloaded, monkeypatch):
    pipe, wanted = offloaded("model")
    ran = []
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        hook = part._hf_hook
        monkeypatch.setattr(hook, "pre_forward", partial(_noted, ran, hook.pre_forward))
        others = [other.model for other in hook.other_hooks]
        assert len(others) == 2
        assert hook.offload_strategy(hooks=others, model_id="", model=part, execution_device="cpu") == others
    np.testing.assert_allclose(frames(pipe), wanted, atol=1e-5)
    names = ["UMT5EncoderModel", "WanTransformer3DModel", "AutoencoderKLWan"]
    assert [name for name, _ in groupby(ran)] == names


def _noted(ran, before, module, *arguments, **settings):
    ran.append(type(module).__name__)
    return before(module, *arguments, **settings)


def test_offload_of_layers(offloaded):
    pipe, wanted = offloaded("group")
    assert all(_is_group_offload_enabled(part) for part in (pipe.text_encoder, pipe.transformer, pipe.vae))
    np.testing.assert_allclose(frames(pipe), wanted, atol=1e-5)
