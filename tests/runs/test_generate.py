"""Whole runs on tiny random pipelines: the videos, figures and reports that they leave."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from psa_diffusers.errors import InputError
from psa_diffusers.report.video import read_video
from psa_diffusers.runs import generate, pipeline_call
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.step_clock import StepClock
from psa_testing.tiny_pipelines import tiny_image
from psa_testing.tiny_runs import FRAMES, LAYERS, SIZE, STEPS, carry_out, contents

SPARSE_FILES = ["attention.png", "dense.mp4", "filmstrip.png", "report.json", "side-by-side.mp4", "small.mp4"]


def test_a_comparison_leaves_everything(ask, tmp_path):
    summary = carry_out(ask(compare=True))
    assert contents(tmp_path / "out") == ["0000-a-cat", "0001-a-dog", "report.html", "run.json"]
    for name in ("0000-a-cat", "0001-a-dog"):
        assert contents(tmp_path / "out" / name) == SPARSE_FILES
    assert (summary["status"], summary["made"], summary["kept"], summary["missing"]) == ("complete", 2, 0, 0)
    assert [entry["prompt"] for entry in summary["prompts"]] == ["a cat", "a dog"]
    clip = read_video(tmp_path / "out" / "0000-a-cat" / "small.mp4")
    assert (clip.frames.shape, clip.fps) == ((FRAMES, SIZE, SIZE, 3), 8)


def test_the_report_of_a_prompt_is_complete_and_consistent(ask, tmp_path):
    summary = carry_out(ask("a cat", compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    attention = report["runs"]["small"]["attention"]
    density = np.array(attention["density"])
    assert density.shape == (STEPS, LAYERS)
    assert attention["dense_steps"] == 1
    assert (density[0] == 1).all() and (density[1:] < 1).all()
    assert summary["prompts"][0]["density"] == pytest.approx(density.mean())
    for run_name in ("dense", "small"):
        seconds = report["runs"][run_name]["seconds"]
        assert len(seconds["per_step"]) == STEPS
        assert seconds["prepare"] + seconds["denoise"] + seconds["decode"] == pytest.approx(seconds["total"])
    assert report["runs"]["small"]["seconds"]["sparse_steps"] == STEPS - 1
    assert len(report["comparison"]["psnr"]["per_frame"]) == FRAMES
    assert report["comparison"]["psnr"]["mean"] == summary["prompts"][0]["psnr"]
    assert len(report["comparison"]["flicker"]["per_frame"]) == FRAMES
    assert report["comparison"]["flicker"]["mean"] == summary["prompts"][0]["flicker"] > 0
    assert report["comparison"]["psnr"]["identical_frames"] == 0  # the sparse run is another computation
    assert report["settings"]["flow_shift"] == 7.0
    assert report["settings"]["preset_rules"]["thresholds"] == [0.3, 0.5, 0.7]
    assert report["seed"] == 3 and {"torch", "diffusers"} <= set(report["versions"])
    assert report["load_seconds"] > 0 and report["hardware"]["device"] == "cpu"


def test_compiled_blocks_make_the_same_videos(ask, tmp_path, monkeypatch):
    carry_out(ask("a cat", compare=True, output=str(tmp_path / "eager")))
    counter = CompileCounter()
    monkeypatch.setenv("CXX", sys.executable)  # asked for by what is not used here
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    carry_out(ask("a cat", compare=True, compile=True))
    # Dense ones, stock and patched, and sparse ones; blocks that are alike share them.
    assert 1 < counter.frame_count <= 3
    for name in ("dense.mp4", "small.mp4"):
        eager, compiled = (read_video(tmp_path / run / "0000-a-cat" / name).frames for run in ("eager", "out"))
        assert np.array_equal(eager, compiled)
    with pytest.raises(InputError, match="compile was true and is now false"):
        carry_out(ask("a cat", compare=True))


def test_a_density_is_met_and_shown_and_another_one_is_another_run(ask, tmp_path):
    carry_out(ask("a cat", density=1.0, compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    assert report["settings"]["density"] == 1 and report["settings"]["preset_rules"]["thresholds"] == [1, 1, 1]
    assert report["runs"]["small"]["attention"]["density_sparse"] == 1  # the preset's own keeps less
    page = (tmp_path / "out" / "report.html").read_text()
    assert "small at density 1 against dense attention" in page
    with pytest.raises(InputError, match=r"density was 1\.0 and is now 0\.6"):
        carry_out(ask("a cat", density=0.6, compare=True))


def test_a_speedup_is_dense_time_over_sparse_time_without_compiling(ask, tmp_path, monkeypatch):
    seconds = StepClock.seconds

    def told(clock):
        step, total, compiling, at = (2.0, 30.0, 20.0, 1) if "small" in running else (7.0, 50.0, 90.0, 0)
        steps = [step] * STEPS
        steps[at] += compiling  # at the first step of its kind
        both = {"total": total + compiling, "denoise": STEPS * step + compiling}
        return {**seconds(clock), **both, "per_step": steps, "median_step": step}

    running: list[str] = []
    video = pipeline_call.generate_video

    def generate_video(pipe, plan, prompt, name, *rest):
        running[:] = [name]
        return video(pipe, plan, prompt, name, *rest)

    for module in (generate, pipeline_call):
        monkeypatch.setattr(module, "generate_video", generate_video)
    monkeypatch.setattr(StepClock, "seconds", told)
    summary = carry_out(ask("a cat", compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    speedup = report["comparison"]["speedup"]
    assert speedup == {"total": pytest.approx(5 / 3), "denoise": pytest.approx(3.5), "sparse_step": pytest.approx(3.5)}
    assert summary["prompts"][0]["speedup"] == pytest.approx(5 / 3)


def test_dense_and_sparse_share_the_seed_and_the_pipeline_is_given_back(ask, tmp_path):
    first = ask("a cat", "a cat", compare=True, output=str(tmp_path / "both"))
    carry_out(first)
    carry_out(ask("a cat", preset="dense", output=str(tmp_path / "dense")))
    dense = (tmp_path / "dense" / "0000-a-cat" / "dense.mp4").read_bytes()
    # The second prompt's dense run comes after a sparse one: nothing of it may be left.
    assert (tmp_path / "both" / "0000-a-cat" / "dense.mp4").read_bytes() == dense
    assert (tmp_path / "both" / "0001-a-cat" / "dense.mp4").read_bytes() == dense
    sparse = [(tmp_path / "both" / name / "small.mp4").read_bytes() for name in ("0000-a-cat", "0001-a-cat")]
    assert sparse[0] == sparse[1]


def test_the_report_says_what_share_of_the_time_the_dense_steps_are(ask, saved, tmp_path, monkeypatch):
    seconds = StepClock.seconds
    monkeypatch.setattr(StepClock, "seconds", lambda clock: {**seconds(clock), "per_step": [4.1, 1.9, 3.0, 1.0]})
    (tmp_path / "few.yaml").write_text((saved / "small.yaml").read_text() + "dense_steps: 1\n")
    carry_out(ask("a cat", preset=str(tmp_path / "few.yaml"), compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    entry = report["runs"]["few"]
    assert (entry["seconds"]["dense_steps"], entry["seconds"]["dense_share"]) == (1, pytest.approx(0.41))
    assert (entry["attention"]["dense_at"], entry["attention"]["dense_last"]) == ([0], 0)
    assert "dense_share" not in report["runs"]["dense"]["seconds"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("1 of 4 steps dense: 41 % of the denoising time") == 1


def test_dense_steps_at_the_end_and_by_rules_count_too(ask, saved, tmp_path, monkeypatch):
    seconds = StepClock.seconds
    monkeypatch.setattr(StepClock, "seconds", lambda clock: {**seconds(clock), "per_step": [4.0, 1.0, 3.0, 2.0]})
    keys = 'dense_steps: 0\ndense_last: 1\nsteps: [{match: "0-25%", dense: true}]\n'
    (tmp_path / "few.yaml").write_text((saved / "small.yaml").read_text() + keys)
    carry_out(ask("a cat", preset=str(tmp_path / "few.yaml")))
    entry = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())["runs"]["few"]
    assert (entry["attention"]["dense_at"], entry["attention"]["dense_last"]) == ([0, 3], 1)
    assert (entry["seconds"]["sparse_steps"], entry["seconds"]["median_sparse_step"]) == (2, 2.0)
    html = (tmp_path / "out" / "report.html").read_text()
    assert "2 of 4 steps dense: 60 % of the denoising time" in html and "Last steps kept dense" in html


@pytest.mark.parametrize("rules", ['density: 0.5\nsteps: [{match: "25-50%", density: 1.0}]\n', "density: 1.0\n"])
def test_steps_that_keep_every_key_are_not_dense_ones(ask, tmp_path, monkeypatch, rules):
    """The figures of a run, its warnings and its statistics count alike."""
    seconds = StepClock.seconds
    monkeypatch.setattr(StepClock, "seconds", lambda clock: {**seconds(clock), "per_step": [4.0, 1.0, 3.0, 2.0]})
    keys = "block: {query: 32, key: 16}\nmin_tokens: 0\ndense_steps: 1\nrule: budget\n"
    (tmp_path / "full.yaml").write_text(keys + rules)
    summary = carry_out(ask("a cat", preset=str(tmp_path / "full.yaml")))
    run = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())["runs"]["full"]
    assert run["attention"]["density"][1] == [1.0, 1.0]
    assert run["attention"]["dense_at"] == [0] and run["seconds"]["dense_steps"] == 1
    assert (run["seconds"]["sparse_steps"], run["seconds"]["median_sparse_step"]) == (3, 2.0)
    assert not summary["prompts"][0]["warnings"]


def test_a_whole_run_of_dense_steps_equals_dense(ask, saved, tmp_path):
    (tmp_path / "small.yaml").write_text("dense_steps: 1.0\nmin_tokens: 0\n")
    summary = carry_out(ask("a cat", preset=str(tmp_path / "small.yaml"), compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    assert report["comparison"]["psnr"]["identical_frames"] == FRAMES
    assert summary["prompts"][0]["psnr"] is None
    assert "dense throughout" in summary["prompts"][0]["warnings"][0]


@pytest.mark.parametrize("preset", ["dense", "small"])
def test_without_compare_there_is_pipeline_call(preset, ask, saved, tmp_path):
    path = str(saved / "small.yaml") if preset == "small" else preset
    carry_out(ask("a cat", preset=path))
    assert contents(tmp_path / "out" / "0000-a-cat") == sorted([f"{preset}.mp4", "report.json"])
    assert "<video" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("model", ["experts", "i2v"])
def test_other_pipelines_run_too(model, ask, saved, tmp_path):
    tiny_image().save(tmp_path / "image.png")
    image = str(tmp_path / "image.png") if model == "i2v" else None
    summary = carry_out(ask("a cat", model=str(saved / model), image=image, compare=True))
    assert summary["status"] == "complete"
    assert summary["prompts"][0]["density"] < 1


def test_samples_have_seeds_of_their_own_and_vbench_names(ask, tmp_path):
    summary = carry_out(ask("a cat?", "a dog", compare=True, samples=2, vbench=True, steps=2))
    assert [entry["seed"] for entry in summary["prompts"]] == [3, 4, 3, 4]
    names = ["a cat?-0.mp4", "a cat?-1.mp4", "a dog-0.mp4", "a dog-1.mp4"]
    assert contents(tmp_path / "out" / "vbench") == ["dense", "small"]
    assert contents(tmp_path / "out" / "vbench" / "dense") == names
    assert contents(tmp_path / "out" / "vbench" / "small") == names
    for entry, name in zip(summary["prompts"], names, strict=True):
        video = (tmp_path / "out" / entry["folder"] / "small.mp4").read_bytes()
        assert (tmp_path / "out" / "vbench" / "small" / name).read_bytes() == video
    single = carry_out(ask("a cat?", preset="dense", seed=4, steps=2, output=str(tmp_path / "single")))
    alone = (tmp_path / "single" / single["prompts"][0]["folder"] / "dense.mp4").read_bytes()
    assert (tmp_path / "out" / "vbench" / "dense" / "a cat?-1.mp4").read_bytes() == alone
    # Asked for again, without videos to make, and in another run's place.
    carry_out(ask("a cat?", "a dog", compare=True, samples=2, vbench=True, steps=2))
    carry_out(ask("a cow", preset="dense", vbench=True, steps=2, overwrite=True))
    assert contents(tmp_path / "out" / "vbench" / "dense") == ["a cow-0.mp4"]
    assert contents(tmp_path / "out" / "vbench") == ["dense"]


def test_each_expert_may_have_its_own_preset(ask, saved, tmp_path):
    (tmp_path / "second.yaml").write_text("dense_steps: 1.0\nmin_tokens: 0\n")
    experts = str(saved / "experts")
    carry_out(ask("a cat", model=experts, preset_2=str(tmp_path / "second.yaml"), guidance=1.0))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    attention = report["runs"]["small"]["attention"]
    ran = {}
    for row in attention["density"]:
        for layer, value in zip(attention["layers"], row, strict=True):
            ran.setdefault(layer.split(".")[0], set()).add(value)
    assert ran["transformer_2"] == {None, 1.0}
    assert min(value for value in ran["transformer"] if value is not None) < 1
    assert report["settings"]["preset_2_rules"]["dense_steps"] == 1.0
    for changes in ({}, {"model": experts, "preset": "dense"}):
        with pytest.raises(InputError, match="--preset-2 psa-1: needs a model with two transformers"):
            make_plan(ask("a cat", preset_2="psa-1", **changes))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (("a cat", "a yes/no sign"), "the prompt 'a yes/no sign' holds a character that no file name can"),
        (("a cat " * 50,), "makes a file name of 305 bytes; at most 255"),
        (("a cat", "a cat"), "the prompt 'a cat' is given twice; use --samples"),
    ],
)
def test_prompts_that_vbench_could_not_name(ask, prompts, message):
    with pytest.raises(InputError, match=message):
        make_plan(ask(*prompts, vbench=True))
