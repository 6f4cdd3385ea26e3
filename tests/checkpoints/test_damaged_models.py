"""A model's folder that is damaged, or put together of two: one line before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.shell import run_command
from psa_diffusers.errors import InputError

TRANSFORMER, VAE = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("transformer", "vae"))
TEXT_ENCODER = "text_encoder/model.safetensors"
SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2", "--preset", "dense"]


@pytest.fixture
def quiet_diffusers():
    """As where the command starts: it quiets diffusers by a variable, which is read when diffusers is imported."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    shutil.copytree(saved / "wan", tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path):
    return load_pipeline(resolve_model(str(folder)), dtype="float32", device="cpu", offload="none")


def in_json(file: str, **changes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **changes}))

    return damage


def without_weights(file: str, part: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / file)
        kept = {name: value for name, value in weights.items() if part not in name}
        assert len(kept) < len(weights)
        save_file(kept, folder / file, metadata={"format": "pt"})

    return damage


def with_weights(file: str, **more) -> Callable[[Path], None]:
    return lambda folder: save_file({**load_file(folder / file), **more}, folder / file, metadata={"format": "pt"})


def without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / file).unlink() for file in files] and None


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def holding(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def without_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name)


DAMAGES = {
    "weights of a block missing": (
        without_weights(TRANSFORMER, "blocks.1."),
        r"transformer: its weights lack blocks\.1\.\S+ and \d+ more; the files are not complete",
    ),
    "one weight missing": (
        without_weights(TRANSFORMER, "proj_out.bias"),
        r"transformer: its weights lack proj_out\.bias;",
    ),
    "more blocks in the configuration": (
        in_json("transformer/config.json", num_layers=3),
        r"transformer: its weights lack blocks\.2\.",
    ),
    "fewer blocks in the configuration": (
        in_json("transformer/config.json", num_layers=1),
        r"transformer: config\.json has no place for blocks\.1\.\S+ and \d+ more of its weights",
    ),
    "a part that the configuration leaves out": (
        in_json("transformer/config.json", cross_attn_norm=False),
        r"transformer: config\.json has no place for blocks\.0\.norm2",
    ),
    "weights of another size": (in_json("transformer/config.json", ffn_dim=77), r"transformer: .*(size|shape)"),
    "weights cut off": (cut(TRANSFORMER, 5000), r"transformer: "),
    "weights empty": (cut(TRANSFORMER, 0), r"transformer: "),
    "weights that are text": (holding(TRANSFORMER, "version https://git-lfs.github.com/spec/v1\n"), r"transformer: "),
    "no weights": (without(TRANSFORMER), r"transformer: "),
    "configuration of another class": (
        in_json("model_index.json", transformer=["diffusers", "LTXVideoTransformer3DModel"]),
        r"transformer: ",
    ),
    "text encoder's block missing": (
        without_weights(TEXT_ENCODER, "block.1."),
        r"text_encoder: its weights lack encoder\.block\.1\.",
    ),
    "text encoder with fewer blocks": (
        in_json("text_encoder/config.json", num_layers=1),
        r"text_encoder: config\.json has no place for encoder\.block\.1\.",
    ),
    "text encoder of another size": (in_json("text_encoder/config.json", d_ff=41), r"text_encoder: .*(size|shape)"),
    "text encoder cut off": (cut(TEXT_ENCODER, 5000), r"text_encoder: "),
    "no text encoder": (without_folder("text_encoder"), r"text_encoder: "),
    "text encoder's configuration broken": (holding("text_encoder/config.json", "{"), r"text_encoder: "),
    "vae's weights missing": (without_weights(VAE, "decoder.conv_out"), r"vae: its weights lack decoder\.conv_out"),
    "vae cut off": (cut(VAE, 5000), r"vae: "),
    "no tokenizer": (without_folder("tokenizer"), r"tokenizer: "),
    "tokenizer's files missing": (
        without("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        r"tokenizer: ",
    ),
    "tokenizer's vocabulary missing": (without("tokenizer/tokenizer.json"), r"tokenizer: "),
    "tokenizer broken": (holding("tokenizer/tokenizer.json", "{}"), r"tokenizer: "),
    "no scheduler": (without_folder("scheduler"), r"scheduler: "),
    "scheduler broken": (holding("scheduler/scheduler_config.json", "[1"), r"scheduler: "),
    "a class that is not there": (
        in_json("model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
        r"scheduler is a NoSuchScheduler, which diffusers \S+ does not have",
    ),
    "a library that is not taken": (
        in_json("model_index.json", scheduler=["subprocess", "Popen"]),
        r"model_index\.json: scheduler is of subprocess; allowed are diffusers and transformers",
    ),
    "an entry that is none": (
        in_json("model_index.json", vae=["diffusers", 3]),
        r"model_index\.json: vae is \['diffusers', 3\]",
    ),
    "a component taken out": (
        in_json("model_index.json", tokenizer=[None, None]),
        r"model_index\.json has no tokenizer",
    ),
    "no transformer listed": (in_json("model_index.json", transformer=[None, None]), r"has no transformer"),
}
REFUSED_AT_ONCE = {
    "no index": (without("model_index.json"), r"no model_index\.json there"),
    "index is a list": (holding("model_index.json", "[]"), r"model_index\.json is not a JSON object"),
    "index nested without end": (holding("model_index.json", "[" * 100_000), r"cannot read model_index\.json"),
    "no transformer configuration": (without("transformer/config.json"), r"cannot read transformer/config\.json"),
    "no vae configuration": (without("vae/config.json"), r"cannot read vae/config\.json"),
    "configuration broken": (holding("transformer/config.json", "{'a': 1}"), r"cannot read transformer/config\.json"),
    "layers are words": (in_json("transformer/config.json", num_layers="two"), r"transformer/config\.json is damaged"),
    "no layers": (in_json("transformer/config.json", num_layers=0), r"is damaged: number of layers is 0"),
    "half a layer": (in_json("transformer/config.json", num_layers=1.5), r"is damaged: number of layers is 1\.5"),
    "heads are a list": (in_json("transformer/config.json", num_attention_heads=[2]), r"number of heads is \[2\]"),
    "patch of one number": (in_json("transformer/config.json", patch_size=[1]), r"transformer/config\.json is damaged"),
    "patch of nothing": (in_json("transformer/config.json", patch_size=[1, 0, 2]), r"number of size is 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_when_the_model_loads(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError, match=rf"^--model {folder}: cannot be loaded: .*{message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", REFUSED_AT_ONCE)
def test_damage_that_configurations_show_is_told_before_anything_loads(name, folder):
    damage, message = REFUSED_AT_ONCE[name]
    damage(folder)
    with pytest.raises(InputError, match=rf"^--model {folder}: .*{message}") as caught:
        resolve_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_would_load_without_its_vocabulary(folder):
    """T5's, which most models have, then takes every word for unknown."""
    in_json("model_index.json", tokenizer=["transformers", "T5TokenizerFast"])(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(
        InputError, match=r"tokenizer: has no vocabulary; tokenizer\.json is missing, and so is spiece\.model"
    ):
        load(folder)


def test_a_text_encoder_may_be_saved_with_its_decoder(folder):
    with_weights(TEXT_ENCODER, **{"decoder.block.0.layer.0.weight": torch.ones(2), "lm_head.weight": torch.ones(2)})(
        folder
    )
    pipe = load(folder)
    assert not [name for name, value in pipe.text_encoder.named_parameters() if value.is_meta]


@pytest.mark.usefixtures("quiet_diffusers")
@pytest.mark.parametrize("processes", [[], ["--num-processes", "2"]])
def test_the_command_says_it_in_one_line_and_leaves_nothing(processes, folder, tmp_path, capfd):
    without_weights(TRANSFORMER, "blocks.1.")(folder)
    command = [
        "--model",
        str(folder),
        *SMALL,
        *processes,
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "out"),
        "a cat",
        "a dog",
    ]
    assert run_command("psa-generate", generate_app, command) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(
        f"psa-generate: error: --model {folder}: cannot be loaded: transformer: its weights lack "
    )
    assert said.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.html"))
