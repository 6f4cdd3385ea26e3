"""`psa-generate --check`: what it says is what a run gets, and it reads no weights."""

import json
import re
from dataclasses import replace

import pytest
import torch

from psa_diffusers import load_preset
from psa_diffusers.checkpoints import resolve
from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.shell import run_command
from psa_diffusers.families import find_family
from psa_diffusers.patch import served_calls
from psa_diffusers.runs.check import machine
from psa_diffusers.runs.check.check import check_plan
from psa_diffusers.runs.check.costs import correction_bytes, kept_list_bytes, list_bytes
from psa_diffusers.runs.check.network import attention_shape
from psa_diffusers.runs.check.text import WIDTH, as_text
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.ranges import ranges
from psa_diffusers.runs.request import Request
from psa_kernels import AttentionSpec, psa_attention
from psa_testing.families import NETWORKS, PUBLISHED, SAVED

pytestmark = pytest.mark.usefixtures("one_thread")


def checked(**options):
    return check_plan(make_plan(Request(prompts=(), check=True, **options)))


def said(text: str, label: str) -> str:
    """The rows of a label, each unwrapped."""
    found = re.findall(rf"^{re.escape(label)}  +(.*(?:\n +.*)*)", text, re.MULTILINE)
    return "\n".join(re.sub(r"\n +", " ", row) for row in found)


def test_the_demo(capsys):
    assert run_command("psa-generate", generate_app, ["--check"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH <= 100
    assert f"torch {torch.__version__}" in said(text, "Software")
    assert said(text, "Device").startswith("cpu")
    assert said(text, "Model") == "demo, a WanPipeline"
    assert said(text, "Video") == "33 frames of 192 x 192, 16 denoising steps, float32"
    assert said(text, "Transformer").startswith("WanTransformer3DModel (Wan 2.1 and 2.2), 9.07 million weights")
    assert said(text, "Self-attention") == "8 layers, 4 heads of head_dim 64"
    assert said(text, "Tokens") == "5,184 of the video, 9 x 24 x 24"
    assert said(text, "Dense phase") == "4 of 16 steps are dense by the preset (steps 1 to 4)"
    assert said(text, "Density") == "0.259 expected of sparse steps, as a share of dense attention's work"
    assert said(text, "Implementation") == "reference not hopper-int8, hopper, triton-int8, triton: for cuda devices"
    assert "nothing is compiled" in said(text, "Kernels")
    assert "pyramids of one head at a time, lists of a call 14.1 kB" in said(text, "Memory")
    assert "not a measurement" in said(text, "Speed-up")


@pytest.mark.parametrize("name", ["hunyuan-video", "mochi"])
def test_a_saved_model_without_its_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "is_installed", lambda package: True)
    pipe = SAVED[name].build()
    pipe.save_pretrained(tmp_path)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert weights
    for file in weights:
        file.unlink()
    size, frames = SAVED[name].size, SAVED[name].frames
    preset = load_preset("psa-3").replace(min_tokens=0)
    check = check_plan(
        replace(
            make_plan(
                Request(prompts=(), check=True, model=str(tmp_path), height=size, width=size, frames=frames, steps=8)
            ),
            preset=preset,
        )
    )
    (expert,) = check.experts
    modules = find_family(pipe.transformer).self_attentions(pipe.transformer)
    assert expert.network.layers == tuple(modules)
    assert expert.network.parameters == sum(weight.numel() for weight in pipe.transformer.parameters())
    text = as_text(check)
    grid = {"hunyuan-video": "48 of the video, 3 x 4 x 4", "mochi": "48 of the video, 3 x 4 x 4"}[name]
    assert said(text, "Tokens").startswith(grid)
    assert said(text, "Dense phase") == "2 of 8 steps are dense by the preset (steps 1 to 2)"
    assert said(text, "Self-attention") == f"{len(modules)} layers, 2 heads of head_dim 16"
    kind = {
        "hunyuan-video": "HunyuanVideoTransformer3DModel (HunyuanVideo)",
        "mochi": "MochiTransformer3DModel (Mochi)",
    }[name]
    assert said(text, "Transformer").startswith(kind)


@pytest.mark.parametrize("card", [card for card in MODELS.values() if card.hub_id], ids=lambda card: card.name)
def test_the_grid_is_what_the_family_reads_in_a_run(card):
    """For the default video of each alias: `PUBLISHED` has what its pipeline gives the transformer."""
    found = [each for each in PUBLISHED if each.checkpoint == card.transformer[0]]
    if not found:
        pytest.skip("the installed diffusers lacks its family")
    (published,) = found
    kind = resolve.PIPELINE_KINDS[card.pipeline]
    transformer = published.shapes(**NETWORKS[published.model].one_block)
    config = json.loads(transformer.to_json_string())
    assert kind.token_grid(published.vae, config, card.frames, card.height, card.width) == published.grid
    attention = next(iter(find_family(transformer).self_attentions(transformer).values()))
    shape = attention_shape(attention)
    assert (shape.heads, shape.head_dim) == (published.heads, published.head_dim)


def test_calls_too_small_to_gain_on_a_gpu(monkeypatch):
    """Here a CPU is taken for one. The demo's card says from how many tokens on it is sparse, without a word."""
    monkeypatch.setattr(served_calls, "is_gpu", lambda device: True)
    monkeypatch.setattr(served_calls, "why_no_kernel", lambda call: None)
    demo = make_plan(Request(prompts=(), check=True, dtype="bfloat16", device="cpu"))
    text = as_text(check_plan(demo))
    assert said(text, "Implementation") and not said(text, "Little work") and not said(text, "Forwards")
    with_graphs = replace(demo, settings=replace(demo.settings, cuda_graphs=True))
    assert said(as_text(check_plan(with_graphs)), "Forwards").startswith("replayed as CUDA graphs")
    demo = replace(demo, preset=load_preset("psa-3"))
    text = as_text(check_plan(demo))
    assert "layers 0 to 7: attention of 5,184 tokens x 4 heads x 64 is 27.5 GFLOP" in said(text, "Little work")
    assert said(text, "Implementation") and not said(text, "Falls back")
    monkeypatch.setattr(served_calls, "LOSES_BELOW", 2.8e10)
    text = as_text(check_plan(demo))
    assert "layers 0 to 7 run dense: attention of 5,184 tokens x 4 heads x 64 is 27.5 GFLOP" in said(text, "Falls back")
    assert said(text, "Density") == "1: no layer is sparse" and not said(text, "Implementation")


def test_what_is_dense_and_why(saved):
    small = str(saved / "wan")
    base = make_plan(Request(prompts=(), check=True, model=small, height=64, width=64, frames=5, steps=4))
    text = as_text(check_plan(base))
    assert said(text, "Falls back") == (
        "all layers run dense: the sequence of 32 tokens is shorter than min_tokens=2048"
    )
    assert said(text, "Speed-up") == "none: nothing is sparse" and not said(text, "Implementation")

    larger = make_plan(Request(prompts=(), check=True, model=small, height=128, width=128, frames=5, steps=4))
    blocks = {"min_tokens": 0, "block": {"query": 32, "key": 16}}

    def under(**changes):
        return as_text(check_plan(replace(larger, preset=load_preset("psa-3").replace(**{**blocks, **changes}))))

    assert said(under(layers=[{"match": "1", "dense": True}]), "Dense layers") == "1, as rules of the preset say"
    assert "all 4 steps" in said(under(dense_steps=1.0), "Dense phase")
    assert said(under(dense_steps=0, dense_last=1), "Dense phase").endswith(
        "1 of 4 steps are dense by the preset (step 4)"
    )
    mass = under(rule="mass", thresholds=(0.5, 0.7, 0.9))
    assert said(mass, "Density").startswith("depends on the video")
    assert said(mass, "Speed-up") == "not estimated, as the density depends on the video"
    two = under(steps=[{"match": "3", "thresholds": (0.5, 0.6, 0.7)}])
    assert "of sparse layers alone" in said(two, "Density") and two.count("Implementation") == 2
    dense = as_text(check_plan(make_plan(Request(prompts=(), check=True, model=small, preset="dense"))))
    assert said(dense, "Preset").startswith("dense:") and not said(dense, "Density")


def test_a_model_with_sparse_attention_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "is_installed", lambda package: True)
    pipe = SAVED["kandinsky5"].build()
    pipe.transformer.register_to_config(attention_type="nabla")
    pipe.save_pretrained(tmp_path)
    text = as_text(checked(model=str(tmp_path), height=64, width=64, frames=9))
    assert "sparse attention of its own (NABLA)" in said(text, "Falls back")
    assert said(text, "Speed-up") == "none: nothing is sparse"


def test_two_experts_each_with_its_preset(saved):
    text = as_text(checked(model=str(saved / "experts"), preset="psa-3", preset_2="psa-5"))
    assert [line.split()[1] for line in text.splitlines() if line.startswith("For ")] == [
        "pipe.transformer",
        "pipe.transformer_2",
    ]
    presets = said(text, "Preset").splitlines()
    assert [line.split(":")[0] for line in presets] == ["psa-3", "psa-5"]


def test_an_image_may_be_missing_and_prompts_and_loras_are_not_read(saved, capsys):
    arguments = ["--check", "--model", str(saved / "i2v"), "--lora", "nobody/has-this"]
    assert run_command("psa-generate", generate_app, arguments) == 0
    assert "an image would decide the size" in said(capsys.readouterr().out, "Video")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "wann"], "--model wann: no such model (did you mean wan?)"),
        (["--frames", "6"], "--frames 6: must be 4k+1"),
        (["--device", "tpu"], "--device tpu: not a device"),
        (["missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert run_command("psa-generate", generate_app, ["--check", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("changes", [{"num_attention_heads": "two"}, {"patch_size": [1, 0, 2]}, {"num_layers": None}])
def test_a_damaged_configuration_is_one_line(changes, saved, tmp_path, capsys):
    import shutil

    shutil.copytree(saved / "wan", tmp_path / "wan", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "wan" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert run_command("psa-generate", generate_app, ["--check", "--model", str(tmp_path / "wan")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"psa-generate: error: --model {tmp_path / 'wan'}: ") and "config.json" in line


def test_frames_beside_the_video_are_told(tmp_path):
    SAVED["framepack-i2v"].build().save_pretrained(tmp_path)
    text = as_text(checked(model=str(tmp_path), height=64, width=64, frames=9))
    assert said(text, "Tokens") == (
        "144 of the video, 9 x 4 x 4, before those of the text those of earlier frames or conditions beside them are "
        "attended exactly, and not counted below"
    )


def test_a_trial_takes_the_precision_that_the_kernel_has(monkeypatch):
    ((_, offered),) = checked().experts[0].uses
    call = replace(offered.call, spec=replace(offered.call.spec, precision="int8_qk"))
    seen = []

    def noted(q, k, v, spec, **options):
        seen.append(spec.precision)
        return psa_attention(q, k, v, spec, **{**options, "implementation": "reference"})

    monkeypatch.setattr(machine, "psa_attention", noted)
    hopper = next(each for each in machine.BACKENDS if each.name == "hopper")
    shape = machine.Shape(1, 1, 64)
    assert machine.try_kernels(replace(offered, call=call, backend=hopper), shape).problem is None
    assert set(seen) == {"native"}


def test_a_class_that_is_not_there_is_one_line(saved, tmp_path, capsys):
    import shutil

    shutil.copytree(saved / "wan", tmp_path / "wan", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "wan" / "model_index.json"
    file.write_text(file.read_text().replace("UMT5EncoderModel", "UMT99EncoderModel"))
    assert "UMT99EncoderModel" in file.read_text()
    assert run_command("psa-generate", generate_app, ["--check", "--model", str(tmp_path / "wan")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "text_encoder is a UMT99EncoderModel, which transformers" in line


def test_offline_without_the_model_is_one_line(monkeypatch, tmp_path, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert run_command("psa-generate", generate_app, ["--check", "--model", "nobody/nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--model nobody/nothing: " in line and "not in the local cache" in line


def test_lists_take_what_is_said():
    """Of a call that is computed."""
    check = checked()
    ((_, offered),) = check.experts[0].uses
    q, k, v = (torch.randn(1, 5184, 4, 64) for _ in range(3))
    _, lists = psa_attention(q, k, v, offered.call.spec, return_lists=True)
    assert list_bytes(offered.call) == lists.ids.nbytes + lists.counts.nbytes
    uses, preset = check.experts[0].uses, load_preset("psa-3")
    assert kept_list_bytes(preset, uses, 2) == 0
    assert kept_list_bytes(preset.replace(refresh=2), uses, 2) == 2 * 8 * list_bytes(offered.call)
    assert (
        correction_bytes(preset, uses, 2)
        == correction_bytes(preset.replace(correction=True, dense_steps=0), uses, 2)
        == 0
    )
    tokens, (heads, head_dim) = offered.call.layout.video_queries, offered.call.q.shape[2:]
    corrected = preset.replace(correction=True)
    assert correction_bytes(corrected, uses, 2) == 2 * 8 * tokens * heads * (head_dim // 2 + 4)
    shared = preset.replace(share_guidance=True)
    assert kept_list_bytes(shared, uses, 2) == 8 * list_bytes(offered.call)


def test_a_trial_compares_and_tells_what_fails(monkeypatch):
    check = checked()
    ((_, offered),) = check.experts[0].uses
    trial = machine.try_kernels(offered, check.experts[0].network.shape)
    assert trial.problem is None and trial.first > 0 and trial.second > 0
    original = psa_attention

    def wrong(*arguments, return_lists=False, **options):
        result = original(*arguments, return_lists=return_lists, **options)
        return (1.2 * result[0], result[1]) if return_lists else result

    monkeypatch.setattr(machine, "psa_attention", wrong)
    assert "0.200 away from the reference's" in machine.try_kernels(offered, check.experts[0].network.shape).problem

    def broken(*arguments, **options):
        raise RuntimeError("PTX is not\nknown")

    monkeypatch.setattr(machine, "psa_attention", broken)
    trial = machine.try_kernels(offered, check.experts[0].network.shape)
    assert trial.problem == "RuntimeError: PTX is not known" and trial.first is None


def test_full_size_tensors_take_one_row():
    q, k, v = machine.full_size_tensors(machine.Shape(40, 8, 128), 75_600, torch.bfloat16, "cpu")
    assert q.shape == (1, 75_600, 40, 128) and k.shape == v.shape == (1, 75_600, 8, 128)
    assert q.untyped_storage().nbytes() == 256
    spec = AttentionSpec(block_query=128, block_key=64)
    assert machine.make_call(q, k, v, spec).dense_work == 4 * 75_600**2 * 40 * 128


def test_ranges():
    assert ranges([2, 3, 4, 6]) == "2 to 4, 6" and ranges([]) == "" and ranges([0]) == "0"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["psa-3", "psa-auto"])
def test_kernels_compile_on_this_gpu(preset):
    check = checked(device="cuda", dtype="bfloat16", preset=preset)
    text = as_text(check)
    assert said(text, "Kernels") == "compile here; a small call agrees with the reference"
    assert all(trial.problem is None for trial in check.trials.values()) and check.trials
    assert "compute capability" in said(text, "Device")
    assert "pyramids of keys and values" in said(text, "Memory")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_a_video_that_is_long_enough_gets_the_kernel_for_hopper():
    """20,736 tokens: what a run would choose, though the demo's default size is too small for it to pay."""
    check = checked(device="cuda", dtype="bfloat16", height=384, width=384)
    text = as_text(check)
    assert said(text, "Implementation").split()[0] == "hopper" and check.trials["hopper"].problem is None
    small = said(as_text(checked(device="cuda", dtype="bfloat16")), "Implementation")
    assert small.startswith("triton") and "hopper: does not pay for calls of this size on this device" in small


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float32_stays_dense_on_a_gpu():
    text = as_text(checked(device="cuda", dtype="float32"))
    assert "float32" in said(text, "Falls back") and said(text, "Speed-up") == "none: nothing is sparse"
