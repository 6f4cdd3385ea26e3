"""Whole runs on tiny random pipelines: what they leave, how they continue, what they refuse."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_image, tiny_wan, tiny_wan_i2v

from psa_diffusers import generate
from psa_diffusers.cli import generate_app, run_command
from psa_diffusers.errors import InputError
from psa_diffusers.folder_lock import locked
from psa_diffusers.generate import Interrupted, run
from psa_diffusers.settings import Request, make_plan
from psa_diffusers.video import read_video

STEPS, FRAMES, SIZE, LAYERS = 4, 5, 64, 2
SPARSE_FILES = ["attention.png", "dense.mp4", "filmstrip.png", "report.json", "side-by-side.mp4", "small.mp4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_wan(num_layers=LAYERS).save_pretrained(folder / "wan")
    tiny_wan(two_stage=True, num_layers=LAYERS).save_pretrained(folder / "experts")
    tiny_wan_i2v(num_layers=LAYERS).save_pretrained(folder / "i2v")
    (folder / "small.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\nthresholds: [0.3, 0.5, 0.7]\n")
    return folder


@pytest.fixture
def ask(models, tmp_path):
    """Makes a request for a small run into tmp_path / "out"."""

    def make(*prompts, **changes) -> Request:
        request = Request(
            prompts=prompts or ("a cat", "a dog"),
            model=str(models / "wan"),
            preset=str(models / "small.yaml"),
            output=str(tmp_path / "out"),
            steps=STEPS,
            height=SIZE,
            width=SIZE,
            frames=FRAMES,
            fps=8,
            seed=3,
        )
        return replace(request, **changes)

    return make


def carry_out(request: Request) -> dict:
    return run(make_plan(request))


def contents(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_pipeline(monkeypatch, edit) -> None:
    """Runs `edit(pipe)` on every pipeline that is loaded."""
    load = generate.load_pipeline

    def load_and_edit(*arguments, **settings):
        pipe = load(*arguments, **settings)
        edit(pipe)
        return pipe

    monkeypatch.setattr(generate, "load_pipeline", load_and_edit)


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
    assert report["comparison"]["psnr"]["identical_frames"] == 0  # the sparse run is another computation
    assert report["settings"]["flow_shift"] == 7.0
    assert report["settings"]["preset_rules"]["thresholds"] == [0.3, 0.5, 0.7]
    assert report["seed"] == 3 and {"torch", "diffusers"} <= set(report["versions"])
    assert report["load_seconds"] > 0 and report["hardware"]["device"] == "cpu"


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


def test_a_whole_run_of_dense_steps_equals_dense(ask, models, tmp_path):
    (tmp_path / "small.yaml").write_text("dense_steps: 1.0\nmin_tokens: 0\n")
    summary = carry_out(ask("a cat", preset=str(tmp_path / "small.yaml"), compare=True))
    report = json.loads((tmp_path / "out" / "0000-a-cat" / "report.json").read_text())
    assert report["comparison"]["psnr"]["identical_frames"] == FRAMES
    assert summary["prompts"][0]["psnr"] is None
    assert "dense throughout" in summary["prompts"][0]["warnings"][0]


@pytest.mark.parametrize("preset", ["dense", "small"])
def test_without_compare_there_is_one_video(preset, ask, models, tmp_path):
    path = str(models / "small.yaml") if preset == "small" else preset
    carry_out(ask("a cat", preset=path))
    assert contents(tmp_path / "out" / "0000-a-cat") == sorted([f"{preset}.mp4", "report.json"])
    assert "<video" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("model", ["experts", "i2v"])
def test_other_pipelines_run_too(model, ask, models, tmp_path):
    tiny_image().save(tmp_path / "image.png")
    image = str(tmp_path / "image.png") if model == "i2v" else None
    summary = carry_out(ask("a cat", model=str(models / model), image=image, compare=True))
    assert summary["status"] == "complete"
    assert summary["prompts"][0]["density"] < 1


def test_only_what_is_missing_is_made(ask, tmp_path, monkeypatch):
    carry_out(ask())
    kept = tmp_path / "out" / "0000-a-cat" / "small.mp4"
    before = kept.stat().st_mtime_ns
    for path in (tmp_path / "out" / "0001-a-dog").iterdir():
        path.unlink()
    (tmp_path / "out" / "0001-a-dog").rmdir()
    summary = carry_out(ask())
    assert (summary["made"], summary["kept"], summary["missing"]) == (1, 1, 0)
    assert kept.stat().st_mtime_ns == before
    monkeypatch.setattr(generate, "load_pipeline", None)  # a finished run loads nothing
    assert carry_out(ask())["kept"] == 2


def test_ctrl_c_keeps_what_is_done_and_leaves_no_half_files(ask, tmp_path, monkeypatch):
    def interrupt_at_the_dog(pipe):
        encode = pipe.encode_prompt

        def encode_prompt(prompt, **arguments):
            if prompt == "a dog":
                raise KeyboardInterrupt
            return encode(prompt, **arguments)

        pipe.encode_prompt = encode_prompt

    with monkeypatch.context() as patch:
        edit_pipeline(patch, interrupt_at_the_dog)
        with pytest.raises(Interrupted) as stop:
            carry_out(ask("a cat", "a dog", "a fox"))
    assert (stop.value.summary["made"], stop.value.summary["missing"]) == (1, 2)
    assert contents(tmp_path / "out") == ["0000-a-cat", "report.html", "run.json"]
    assert "2 prompts still missing" in (tmp_path / "out" / "report.html").read_text()
    summary = carry_out(ask("a cat", "a dog", "a fox"))
    assert (summary["made"], summary["kept"]) == (2, 1)
    assert "still missing" not in (tmp_path / "out" / "report.html").read_text()


def fail_at_the_dog(error):
    def edit(pipe):
        encode = pipe.encode_prompt

        def encode_prompt(prompt, **arguments):
            if prompt == "a dog":
                raise error
            return encode(prompt, **arguments)

        pipe.encode_prompt = encode_prompt

    return edit


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "out of GPU memory; try --offload model or group, fewer --frames",
        ),
        (OSError(28, "No space left on device"), "cannot write: [Errno 28] No space left on device"),
    ],
    ids=["memory", "disk"],
)
def test_a_run_that_fails_midway_keeps_the_finished_prompts(error, said, ask, tmp_path, monkeypatch, capsys):
    request = ask("a cat", "a dog")
    arguments = ["a cat", "a dog", "--model", request.model, "--preset", request.preset, "--output", request.output]
    arguments += f"--steps {STEPS} --height {SIZE} --width {SIZE} --frames {FRAMES} --fps 8 --seed 3".split()
    with monkeypatch.context() as patch:
        edit_pipeline(patch, fail_at_the_dog(error))
        assert run_command("psa-generate", generate_app, arguments) == 1
    told = capsys.readouterr().err
    assert f"psa-generate: error: {said}" in told and "finished prompts are kept" in told and "Traceback" not in told
    assert contents(tmp_path / "out") == ["0000-a-cat", "report.html", "run.json"]
    assert carry_out(request)["made"] == 1


def test_a_folder_in_which_another_run_writes_is_refused(ask, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(InputError, match=r"another run .* is writing there"):
        carry_out(ask("a cat"))
    assert carry_out(ask("a cat"))["made"] == 1


def test_a_killed_run_s_leftovers_are_swept_up(ask, tmp_path):
    carry_out(ask("a cat"))
    (tmp_path / "out" / "0000-a-cat").rename(tmp_path / "out" / ".0000-a-cat.partial")
    assert carry_out(ask("a cat"))["made"] == 1
    assert contents(tmp_path / "out") == ["0000-a-cat", "report.html", "run.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed was 3 and is now 4"),
        ({"steps": 2, "guidance": 2.0, "fps": 12}, "fps was 8 and is now 12; guidance was 5.0 and is now 2.0; 1 more"),
        ({"prompts": ("a cat",)}, "the prompts differ"),
    ],
)
def test_another_run_s_folder_is_refused(ask, tmp_path, changes, message):
    carry_out(ask())
    before = (tmp_path / "out" / "0000-a-cat" / "small.mp4").stat().st_mtime_ns
    with pytest.raises(InputError, match=f"holds another run .*{message}.*--overwrite"):
        carry_out(replace(ask(), **changes))
    assert (tmp_path / "out" / "0000-a-cat" / "small.mp4").stat().st_mtime_ns == before


def test_overwrite_replaces_the_old_run_and_nothing_else(ask, tmp_path):
    carry_out(ask())
    (tmp_path / "out" / "notes.txt").write_text("mine")
    summary = carry_out(ask("a fox", seed=4, overwrite=True))
    assert summary["made"] == 1
    assert contents(tmp_path / "out") == ["0000-a-fox", "notes.txt", "report.html", "run.json"]


def test_overwrite_keeps_the_old_run_until_the_new_model_is_loaded(ask, tmp_path, monkeypatch):
    carry_out(ask("a cat"))
    before = contents(tmp_path / "out")

    def fail(*arguments, **settings):
        raise RuntimeError("no memory")

    monkeypatch.setattr(generate, "load_pipeline", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        carry_out(ask("a fox", overwrite=True))
    assert contents(tmp_path / "out") == before


def test_files_that_are_not_a_run_s_are_not_touched(ask, tmp_path):
    (tmp_path / "out" / "0000-a-cat").mkdir(parents=True)
    with pytest.raises(InputError, match="0000-a-cat is already there"):
        carry_out(ask("a cat"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file, not a folder"):
        carry_out(ask("a cat", output=str(tmp_path / "file")))
    with pytest.raises(InputError, match="cannot be written to"):
        carry_out(ask("a cat", output=str(tmp_path / "file" / "below")))


def test_a_run_that_fails_at_once_leaves_no_folder(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", None)
    with pytest.raises(TypeError):
        carry_out(ask("a cat"))
    assert not (tmp_path / "out").exists()


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


def test_each_expert_may_have_its_own_preset(ask, models, tmp_path):
    (tmp_path / "second.yaml").write_text("dense_steps: 1.0\nmin_tokens: 0\n")
    experts = str(models / "experts")
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
        (("a cat", "yes/no"), "the prompt 'yes/no' holds a character that no file name can"),
        (("a cat " * 50,), "makes a file name of 305 bytes; at most 255"),
        (("a cat", "a cat"), "the prompt 'a cat' is given twice; use --samples"),
    ],
)
def test_prompts_that_vbench_could_not_name(ask, prompts, message):
    with pytest.raises(InputError, match=message):
        make_plan(ask(*prompts, vbench=True))


def test_black_frames_are_reported(ask, tmp_path, monkeypatch, capsys):
    def blacken(pipe):
        decode = pipe.vae.decode
        pipe.vae.decode = lambda *arguments, **settings: (torch.full_like(decode(*arguments, **settings)[0], -1.0),)

    edit_pipeline(monkeypatch, blacken)
    summary = carry_out(ask("a cat", preset="dense"))
    assert summary["prompts"][0]["warnings"] == [f"dense: {FRAMES} of {FRAMES} frames are all black"]
    assert "all black" in (tmp_path / "out" / "report.html").read_text()
    assert "warning: dense, 'a cat': 5 of 5 frames are all black" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_reported(ask, monkeypatch):
    def spoil(pipe):
        pipe.transformer.register_forward_hook(lambda module, arguments, output: (output[0] * float("nan"),))

    edit_pipeline(monkeypatch, spoil)
    summary = carry_out(ask("a cat", compare=True))
    assert "dense: the latents hold values that are not finite" in summary["prompts"][0]["warnings"]
    assert summary["prompts"][0]["psnr"] is None


def test_sparse_attention_that_is_not_finite_is_reported(ask, monkeypatch, tmp_path, recwarn):
    from psa_diffusers.token_attention import TokenAttention

    sparse = TokenAttention.sparse

    def spoiled(self, layer, at, *arguments):
        head, tail, stats = sparse(self, layer, at, *arguments)
        return (head * float("nan") if layer.name == "blocks.1" and at.step > 1 else head), tail, stats

    monkeypatch.setattr(TokenAttention, "sparse", spoiled)
    summary = carry_out(ask("a cat"))
    told = summary["prompts"][0]["warnings"]
    assert "small: blocks.1: sparse attention was not finite at step 3, 4; dense there" in told
    assert any(line.startswith("small: 4 attention calls ran dense: its sparse output held values") for line in told)
    assert "sparse attention was not finite at step 3, 4" in (tmp_path / "out" / "report.html").read_text()
    assert not [entry for entry in recwarn if "finite" in str(entry.message)]


def test_a_video_too_short_for_sparse_attention_says_so_once(ask, recwarn):
    summary = carry_out(ask("a cat", preset="psa-3"))
    assert summary["prompts"][0]["density"] == 1.0
    throughout, reason = summary["prompts"][0]["warnings"]
    assert throughout == "psa-3: attention was dense throughout"
    calls = (STEPS - 1) * LAYERS * 2  # both guidance branches
    assert reason.startswith(f"psa-3: {calls} attention calls ran dense: the sequence of 32 tokens is shorter")
    assert not [entry for entry in recwarn if "dense" in str(entry.message)]
