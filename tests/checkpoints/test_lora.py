"""LoRA files: what is refused before weights load, what does not fit, and that what fits works as in diffusers."""

import shutil

import peft
import pytest
import torch
from diffusers import WanPipeline

from psa_diffusers.checkpoints import hub
from psa_diffusers.checkpoints import lora as lora_files
from psa_diffusers.checkpoints.load import load_pipeline
from psa_diffusers.checkpoints.lora import resolve_loras
from psa_diffusers.checkpoints.resolve import resolve_model
from psa_diffusers.errors import InputError
from psa_diffusers.families import find_family
from psa_testing.families import SAVED
from psa_testing.lora_files import lora_weights, save_lora
from psa_testing.tiny_pipelines import run


def resolve(*first, second=(), experts=1, pipeline="WanPipeline"):
    texts = [[str(text) for text in group] for group in (first, second)]
    return resolve_loras(*texts, model="wan", pipeline=pipeline, experts=experts)


def load(folder, *first, second=()):
    """A pipeline with LoRA, and what was told of them."""
    model = resolve_model(str(folder))
    told = []
    loras = resolve(*first, second=second, experts=model.experts)
    pipe = load_pipeline(model, dtype="float32", device="cpu", offload="none", loras=loras, tell=told.append)
    return pipe, told


def renamed(old: str, new: str) -> dict[str, torch.Tensor]:
    return {name.replace(old, new): value for name, value in lora_weights().items()}


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in lora_weights().items() if part not in name}


def test_a_weight_stands_after_the_last_colon(tmp_path):
    file = save_lora(tmp_path / "style.v1.safetensors")
    named, weighed, colon = resolve(file), resolve(f"{file}:-0.5"), save_lora(tmp_path / "a:3.safetensors", seed=1)
    assert (named[0].file, named[0].weight, named[0].into) == (file, 1.0, ("transformer",))
    assert (weighed[0].file, weighed[0].weight) == (file, -0.5)
    assert (resolve(colon)[0].file, resolve(colon)[0].weight) == (colon, 1.0)
    assert named[0].digest == weighed[0].digest != resolve(colon)[0].digest
    assert resolve(file, colon)[1].name != resolve(file, colon)[0].name == "style_v1_1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none.safetensors", r"--lora none\.safetensors: no such file, and no hub id"),
        ("./owner/name", r"--lora \./owner/name: no such file, and no hub id"),
        ("one/two/three", r"no such file, and no hub id \(owner/name or owner/name/file\.safetensors\)"),
        ("{good}:much", r"the weight 'much' after the colon must be a number, such as 0\.8"),
        ("{good}:nan", "the weight 'nan' after the colon must be a number"),
        ("{good}:inf", "the weight 'inf' after the colon must be a number"),
        ("{good}:", "the weight '' after the colon must be a number"),
        (":0.5", "--lora :0.5: names nothing"),
        ("{folder}/lora.bin", r"must end in \.safetensors; weights of other formats are not loaded"),
        ("{folder}/text.safetensors", r"cannot be read as a \.safetensors file"),
        ("{folder}/cut.safetensors", r"cannot be read as a \.safetensors file"),
        ("{folder}/model.safetensors", r"holds no LoRA weights .*, but blocks\.0\.weight$"),
        ("{folder}/empty.safetensors", r"holds no LoRA weights \(lora_A and lora_B, or lora_down and lora_up\)$"),
        ("{folder}/half.safetensors", r"not complete: the other factor of transformer\.blocks\.0\.\S+ and 3 more is"),
        ("{folder}/bare", r"holds no \.safetensors file"),
        ("{folder}", r"several \.safetensors files; name one of them: cut\.safetensors, empty\.safetensors, good"),
    ],
)
def test_what_is_no_lora_is_refused_before_anything_loads(text, message, tmp_path):
    save_lora(tmp_path / "good.safetensors")
    save_lora(tmp_path / "model.safetensors", {"blocks.0.weight": torch.ones(2)})
    save_lora(tmp_path / "empty.safetensors", {})
    save_lora(tmp_path / "half.safetensors", without("lora_A"))
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-9])
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        resolve(text.format(good=tmp_path / "good.safetensors", folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_second_factor_may_have_a_bias_and_factors_other_names(tmp_path):
    bias = {**lora_weights(), "transformer.blocks.0.attn1.to_q.lora_B.bias": torch.zeros(64)}
    assert resolve(save_lora(tmp_path / "bias.safetensors", bias))
    down = {name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for name, v in lora_weights().items()}
    assert resolve(save_lora(tmp_path / "down.safetensors", down))


def test_one_file_twice_a_pipeline_without_lora_and_a_second_transformer_that_is_not_there(tmp_path):
    file = save_lora(tmp_path / "a.safetensors")
    shutil.copy(file, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors:2: is the same file as .*a\.safetensors; give it once"):
        resolve(file, f"{tmp_path}/b.safetensors:2")
    with pytest.raises(
        InputError, match=r"wan takes no LoRA: AllegroPipeline of diffusers .* has no load_lora_weights"
    ):
        resolve(file, pipeline="AllegroPipeline")
    with pytest.raises(InputError, match=r"--lora-2 .*: needs a model with two transformers"):
        resolve(second=[file])


def test_a_folder_has_one_file_or_one_that_diffusers_wrote(tmp_path):
    only = save_lora(tmp_path / "only" / "any.safetensors")
    assert resolve(tmp_path / "only")[0].file == only
    save_lora(tmp_path / "only" / "pytorch_lora_weights.safetensors", seed=1)
    assert resolve(tmp_path / "only")[0].file.name == "pytorch_lora_weights.safetensors"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The local cache of the hub, without a network; `cache(file, ...)` puts files of one repository there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(*files):
        repository = tmp_path / "hub" / "models--owner--name"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        for number, file in enumerate(files):
            save_lora(repository / "snapshots" / ("0" * 40) / file, seed=number)

    return put


def test_a_hub_id_is_taken_from_the_cache(cache):
    cache("fast.safetensors", "more/other.safetensors")
    (only,) = resolve("owner/name:0.7")
    assert (only.file.name, only.weight, only.given) == ("fast.safetensors", 0.7, "owner/name")
    (other,) = resolve("owner/name/more/other.safetensors")
    assert other.file.is_file() and other.digest != only.digest


def test_a_hub_id_that_names_too_little_or_is_not_cached(cache):
    with pytest.raises(InputError, match="--lora owner/none: HF_HUB_OFFLINE is set and the LoRA is not in the local"):
        resolve("owner/none")
    cache("a.safetensors", "b.safetensors")
    with pytest.raises(InputError, match=r"owner/name holds several .* name one of them: a\.safetensors, b\.safetens"):
        resolve("owner/name")
    with pytest.raises(InputError, match=r"--lora owner/name/c\.safetensors: HF_HUB_OFFLINE is set and the LoRA"):
        resolve("owner/name/c.safetensors")


def test_a_hub_that_answers_is_asked_for_its_files(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    file = save_lora(tmp_path / "fast.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda api, repository: ["README.md", file.name])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name, **_: str(tmp_path / name))
    assert resolve("owner/name")[0].file == file


def test_a_hub_that_does_not_answer_is_no_matter_where_the_cache_has_it(cache, monkeypatch):
    from huggingface_hub import HfApi, constants

    def silent(api, repository):
        raise RuntimeError("no route to host")

    cache("fast.safetensors")
    monkeypatch.setattr(HfApi, "list_repo_files", silent)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert hub.hub_files("--lora owner/name", "LoRA", "owner/name", ".safetensors") == ["fast.safetensors"]
    with pytest.raises(InputError, match="--lora owner/none: the hub cannot be reached and the LoRA is not in the loc"):
        hub.hub_files("--lora owner/none", "LoRA", "owner/none", ".safetensors")


def test_what_is_loaded_is_what_diffusers_would_load(saved, tmp_path, one_thread):
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2)]
    pipe, told = load(saved / "wan", f"{files[0]}:0.5", f"{files[1]}:-0.25")
    assert told == []
    stock = WanPipeline.from_pretrained(saved / "wan")
    for name, file in zip("ab", files, strict=True):
        stock.load_lora_weights(str(file), adapter_name=name)
    stock.set_adapters(["a", "b"], [0.5, -0.25])
    frames = run(pipe, num_inference_steps=2)
    assert torch.equal(frames, run(stock, num_inference_steps=2))
    plain, _ = load(saved / "wan")
    assert not torch.equal(frames, run(plain, num_inference_steps=2))
    nothing, _ = load(saved / "wan", f"{files[0]}:0")
    assert torch.equal(run(nothing, num_inference_steps=2), run(plain, num_inference_steps=2))


def adapters(pipe) -> dict[str, dict[str, float]]:
    """Of each transformer the adapters that are on, with their weights."""
    found = {}
    for name in ("transformer", "transformer_2"):
        layer = getattr(pipe, name).blocks[0].attn1.to_q
        scaling, active = getattr(layer, "scaling", {}), getattr(layer, "active_adapters", [])
        found[name] = {adapter: scaling[adapter] for adapter in active}
    return found


def test_lora_of_two_experts(saved, tmp_path):
    high, low = (save_lora(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    both, _ = load(saved / "experts", f"{high}:0.5")
    assert adapters(both) == {"transformer": {"1_1": 0.5}, "transformer_2": {"1_1": 0.5}}
    apart, _ = load(saved / "experts", f"{high}:0.5", second=[f"{low}:2", f"{high}:3"])
    assert adapters(apart) == {"transformer": {"1_1": 0.5}, "transformer_2": {"2_2": 2.0, "1_3": 3.0}}
    second, _ = load(saved / "experts", second=[low])
    assert adapters(second) == {"transformer": {}, "transformer_2": {"2_1": 1.0}}


MISFITS = {
    "of another component": renamed("transformer.", "unet."),
    "of another model": renamed("blocks.", "layers."),
    "of another size": lora_weights(width=96),
}


@pytest.mark.parametrize("name", MISFITS)
def test_lora_that_does_not_fit_is_one_line(name, saved, tmp_path, capfd):
    file = save_lora(tmp_path / "style.safetensors", MISFITS[name])
    with pytest.raises(InputError, match=rf"--lora {file}: does not fit the model: ") as caught:
        load(saved / "wan", file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr().err == ""


def test_what_fits_in_part_is_loaded_and_told(saved, tmp_path, capfd):
    file = save_lora(tmp_path / "deep.safetensors", layers=3)
    pipe, told = load(saved / "wan", file)
    place = "blocks.2.attn1.to_out.0.lora_A.weight and 3 more"
    assert told == [f"--lora {file}: 4 of its 12 weights have no place in the model: {place}"]
    assert pipe.get_list_adapters() == {"transformer": ["deep_1"]}
    assert capfd.readouterr().err == ""


def test_dora_is_told(saved, tmp_path):
    name = "transformer.blocks.0.attn1.to_q.dora_scale"
    file = save_lora(tmp_path / "dora.safetensors", {**lora_weights(), name: torch.ones(64, 1)})
    _, told = load(saved / "wan", file)
    assert told == [f"--lora {file}: is a DoRA, whose magnitudes diffusers ignores; its effect will differ"]


def test_factors_without_values_are_refused(saved, tmp_path, monkeypatch):
    """The header would have told; if it did not, the model must not run with factors that have no values."""
    monkeypatch.setattr(lora_files, "_check_header", lambda shown, file: None)
    file = save_lora(tmp_path / "half.safetensors", without("lora_A"))
    with pytest.raises(InputError, match=r"got no values from its weights; the files are not complete"):
        load(saved / "wan", file)


@pytest.mark.parametrize("name", SAVED)
def test_what_diffusers_writes_is_loaded_into_every_family_that_takes_it(name, tmp_path):
    first, second = SAVED[name].build(), SAVED[name].build()
    transformer, pipeline = first.transformer, type(first).__name__
    if not hasattr(first, "load_lora_weights"):
        with pytest.raises(InputError, match=rf"takes no LoRA: {pipeline} of diffusers"):
            resolve(save_lora(tmp_path / "style.safetensors"), pipeline=pipeline)
        return
    attentions = find_family(transformer).self_attentions(transformer).values()
    linear = {part for attn in attentions for part in attn.modules() if isinstance(part, torch.nn.Linear)}
    names = [name for name, part in transformer.named_modules() if part in linear]
    transformer.add_adapter(peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(transformer)
    first.save_lora_weights(str(tmp_path), transformer_lora_layers=layers)
    loras = resolve(f"{tmp_path}:0.5", pipeline=pipeline)
    assert lora_files.load_loras(second, loras) == []
    loaded = peft.get_peft_model_state_dict(second.transformer, adapter_name=loras[0].name)
    assert loaded.keys() == layers.keys() and all(torch.equal(loaded[key], layers[key]) for key in layers)
