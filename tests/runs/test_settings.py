"""What a run is asked to do is checked in full before weights load."""

import sys
from dataclasses import replace

import pytest
import torch

from psa_diffusers.errors import InputError
from psa_diffusers.runs import plan as plan_module
from psa_diffusers.runs.pipeline_arguments import call_arguments
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.request import Request
from psa_presets import load_preset
from psa_testing.tiny_pipelines import tiny_image


def tiny_request(folder, **changes) -> Request:
    small = Request(prompts=("a cat",), model=str(folder), height=64, width=64, frames=9, steps=2, preset="dense")
    return replace(small, **changes)


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
        ({"offload": "group", "compile": True}, r"--compile: needs blocks that stay whole; use --offload none or m"),
        ({"offload": "model", "device": "cpu"}, r"--offload model: needs a CUDA device, and the run is on cpu"),
        ({"cuda_graphs": True, "device": "cpu"}, r"--cuda-graphs: needs a CUDA device, and the run is on cpu"),
        ({"device": "tpu9"}, r"--device tpu9: not a device"),
        ({"device": "meta"}, r"--device meta: not supported"),
        ({"device": "cuda:99"}, r"--device cuda:99: this machine has \d+ CUDA devices"),
        ({"image": "cat.png"}, r"--image: .* makes a video from words alone; .*wan-i2v-14b-480p"),
        ({"compare": True}, r"--compare needs a sparse --preset"),
        ({"density": 0.0, "preset": "psa-3"}, r"--density 0: must be above 0 and up to 1"),
        ({"density": -0.1, "preset": "psa-3"}, r"--density -0.1: must be above 0 and up to 1"),
        ({"density": 1.01, "preset": None}, r"--density 1.01: must be above 0 and up to 1"),
        ({"density": float("nan"), "preset": "psa-3"}, r"--density nan: must be above 0 and up to 1"),
        ({"density": 0.2}, r"--density 0.2: needs a sparse --preset, and it is dense"),
        (
            {"density": 0.2, "preset": "mass-wan2.1-14b"},
            r"--density 0.2 with --preset mass-wan2.1-14b: rule = 'mass': the density depends on the video; allowed: ",
        ),
        (
            {"density": 0.2, "preset": "psa-3", "preset_2": "mass-wan2.1-14b"},
            r"--density 0.2 with --preset-2 mass-wan2.1-14b: rule = 'mass'",
        ),
        ({"density": 0.2, "preset": "psa-33"}, r"--preset psa-33: no such file \(did you mean psa-3\?\)"),
        ({"preset": "psa-33"}, r"--preset psa-33: no such file \(did you mean psa-3\?\)"),
        ({"prompts": ()}, r"no prompt given"),
        ({"prompts": (" ",)}, r"a prompt is empty"),
        ({"prompts": ("missing.txt",)}, r"prompt file missing.txt: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(saved, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        make_plan(tiny_request(saved / "wan", **changes))
    assert "\n" not in str(caught.value)


def test_compiling_on_a_cpu_needs_a_compiler(saved, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    asked = tiny_request(saved / "wan", compile=True, device="cpu")
    with pytest.raises(InputError, match="--compile: calls no-such-compiler on a CPU, which is not there"):
        make_plan(asked)
    monkeypatch.setenv("CXX", sys.executable)
    assert make_plan(asked).settings.compile


def test_graphs_are_the_default_where_a_gpu_has_little_to_do(saved, monkeypatch, tmp_path):
    def planned(**changes):
        return make_plan(Request(prompts=("a red circle",), **{"device": "cuda", **changes})).settings

    assert not planned(device="cpu").cuda_graphs
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    small = planned()
    assert small.cuda_graphs and planned(compare=True).cuda_graphs and planned(preset="dense").cuda_graphs
    assert "cuda_graphs" not in planned(cuda_graphs=False).to_dict()
    large = {"height": 384, "width": 384}
    assert not planned(**large).cuda_graphs and planned(**large, cuda_graphs=True).cuda_graphs
    assert not planned(offload="model").cuda_graphs
    with pytest.raises(InputError, match=r"--cuda-graphs: needs weights that stay on the GPU; use --offload none"):
        planned(offload="model", cuda_graphs=True)
    for key, value in (("refresh", 2), ("share_guidance", "true"), ("correction", "true"), ("dense_attention", "psa")):
        (tmp_path / "kept.yaml").write_text(f"{key}: {value}\n")
        assert not planned(preset=str(tmp_path / "kept.yaml")).cuda_graphs
        with pytest.raises(InputError, match=f"--cuda-graphs: kept has {key}, which leaves something"):
            planned(preset=str(tmp_path / "kept.yaml"), cuda_graphs=True)


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


def test_equal_runs_share_a_default_folder_and_others_do_not(saved):
    first = make_plan(tiny_request(saved / "wan")).output
    assert first == make_plan(tiny_request(saved / "wan")).output
    assert first != make_plan(tiny_request(saved / "wan", seed=1)).output
    assert first != make_plan(tiny_request(saved / "wan", prompts=("a cat", "a dog"))).output


def test_a_density_makes_runs_of_their_own(saved):
    """Alone it means psa-auto; beside presets, each of them at it; a run without one is what it was."""
    plain = make_plan(tiny_request(saved / "wan", preset="psa-3"))
    assert plain.settings.density is None and "density" not in plain.settings.to_dict()
    low, high, paper = (
        make_plan(tiny_request(saved / "wan", preset=preset, density=density))
        for preset, density in ((None, 0.15), (None, 0.3), ("psa-3", 0.3))
    )
    assert low.preset == load_preset("psa-auto").at_density(0.15) and low.settings.preset == "psa-auto"
    assert paper.preset == load_preset("psa-3").at_density(0.3) and paper.settings.preset == "psa-3"
    assert (low.settings.to_dict()["density"], high.settings.to_dict()["density"]) == (0.15, 0.3)
    assert low.settings.preset_rules == low.preset.model_dump(mode="json") != high.settings.preset_rules
    assert len({plan.output for plan in (plain, low, high, paper)}) == 4
    experts = make_plan(tiny_request(saved / "experts", preset=None, preset_2="psa-5", density=0.2))
    assert experts.preset == load_preset("psa-auto").at_density(0.2)
    assert experts.preset_2 == load_preset("psa-5").at_density(0.2)


def test_the_bundled_demo_needs_nothing_but_a_prompt():
    plan = make_plan(Request(prompts=("a red circle",), device="cpu"))
    settings = plan.settings
    assert (settings.source, settings.frames, settings.height, settings.width) == ("bundled", 33, 192, 192)
    assert settings.preset == "psa-3"
    assert plan.model.experts == 1 and not plan.model.takes_image


def test_the_demo_is_sparse_where_it_is_too_small_to_gain(tmp_path, saved):
    """Its card replaces `min_tokens: auto`, whatever preset that stands in, but no number that a user gave."""
    for preset, density in ((None, None), ("psa-5", None), (None, 0.2)):
        plan = make_plan(Request(prompts=("a red circle",), device="cpu", preset=preset, density=density))
        assert plan.preset.min_tokens == plan.settings.preset_rules["min_tokens"] == 2048
    mine = tmp_path / "mine.yaml"
    mine.write_text("min_tokens: 6000\n")
    assert make_plan(Request(prompts=("a red circle",), device="cpu", preset=str(mine))).preset.min_tokens == 6000
    assert make_plan(tiny_request(saved / "wan", preset="psa-3")).preset.min_tokens == "auto"


def test_a_card_may_add_to_the_call(saved, monkeypatch):
    """What it adds decides whose folder it is, and is not there where it adds nothing."""
    plain = make_plan(tiny_request(saved / "wan"))
    assert not {"loras", "arguments"} & set(plain.settings.to_dict())
    card = replace(plain.model.card, arguments=(("max_sequence_length", 64),))
    monkeypatch.setattr(plan_module, "resolve_model", lambda name: replace(plain.model, card=card))
    plan = make_plan(tiny_request(saved / "wan"))
    assert plan.settings.to_dict()["arguments"] == {"max_sequence_length": 64}
    assert plan.output != plain.output
    called = call_arguments(None, plan, plan.prompts, (0,), lambda *step: {})
    assert called["max_sequence_length"] == 64 and called["prompt"] == "a cat"
