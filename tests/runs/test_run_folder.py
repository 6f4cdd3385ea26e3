"""The folder of a run: how a run that was stopped goes on, and whose files it leaves alone."""

import contextlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.shell import run_command
from psa_diffusers.errors import InputError
from psa_diffusers.report.video import read_video
from psa_diffusers.runs import generate, processes
from psa_diffusers.runs.folder import RunFolder
from psa_diffusers.runs.folder_lock import locked
from psa_diffusers.runs.generate import Interrupted
from psa_diffusers.runs.plan import make_plan
from psa_testing.tiny_runs import FRAMES, SIZE, STEPS, carry_out, contents, edit_pipeline


def fail_at_the_dog(error):
    """An edit of a pipeline: it raises the error when it comes to that prompt."""

    def edit(pipe):
        encode = pipe.encode_prompt

        def encode_prompt(prompt, **arguments):
            if prompt == "a dog":
                raise error
            return encode(prompt, **arguments)

        pipe.encode_prompt = encode_prompt

    return edit


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
    with monkeypatch.context() as patch:
        edit_pipeline(patch, fail_at_the_dog(KeyboardInterrupt()))
        with pytest.raises(Interrupted) as stop:
            carry_out(ask("a cat", "a dog", "a fox"))
    assert (stop.value.summary["made"], stop.value.summary["missing"]) == (1, 2)
    assert contents(tmp_path / "out") == ["0000-a-cat", "report.html", "run.json"]
    assert "2 prompts still missing" in (tmp_path / "out" / "report.html").read_text()
    summary = carry_out(ask("a cat", "a dog", "a fox"))
    assert (summary["made"], summary["kept"]) == (2, 1)
    assert "still missing" not in (tmp_path / "out" / "report.html").read_text()


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


def test_a_folder_without_its_report_is_not_done(ask, tmp_path):
    carry_out(ask())
    folder = tmp_path / "out" / "0001-a-dog"
    before = sorted(path.name for path in folder.iterdir())
    (folder / "report.json").unlink()
    summary = carry_out(ask())
    assert (summary["status"], summary["made"], summary["kept"]) == ("complete", 1, 1)
    assert sorted(path.name for path in folder.iterdir()) == before
    for path in folder.iterdir():
        path.unlink()
    assert carry_out(ask())["made"] == 1 and (folder / "small.mp4").is_file()


def without_parts(report):
    report.write_text("{}")


def without_sizes(report):
    """As an earlier version wrote it."""
    report.write_text(
        json.dumps({key: value for key, value in json.loads(report.read_text()).items() if key != "bytes"})
    )
    (report.parent / "small.mp4").write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: (report.parent / "small.mp4").unlink(),
        lambda report: os.truncate(report.parent / "small.mp4", 100),
        lambda report: os.truncate(report, 100),
        without_parts,
        without_sizes,
    ],
    ids=["video gone", "video cut off", "report cut off", "report empty", "video empty"],
)
def test_a_prompt_that_lost_something_is_made_again(damage, ask, tmp_path):
    carry_out(ask())
    video = tmp_path / "out" / "0001-a-dog" / "small.mp4"
    before = len(read_video(video).frames)
    damage(video.with_name("report.json"))
    summary = carry_out(ask())
    assert (summary["status"], summary["made"], summary["kept"]) == ("complete", 1, 1)
    assert len(read_video(video).frames) == before


@pytest.mark.parametrize("module", [generate, processes], ids=["alone", "several processes"])
def test_a_run_that_finished_before_the_lock_was_had_is_seen(module, ask, tmp_path, monkeypatch):
    """Between the first look at the folder and the lock on it, another run finishes there."""
    real, other = generate.locked, replace(ask("a fox", preset="dense"), seed=9)

    @contextlib.contextmanager
    def late(folder):
        monkeypatch.setattr(module, "locked", real)
        carry_out(other)
        with real(folder):
            yield

    monkeypatch.setattr(module, "locked", late)
    with pytest.raises(InputError, match="holds another run"):
        carry_out(ask("a cat")) if module is generate else processes.run_shared(make_plan(ask("a cat", "a dog")), 2)
    assert contents(tmp_path / "out") == ["0000-a-fox", "report.html", "run.json"]


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


def test_one_dense_step_is_not_a_dense_run(ask, tmp_path):
    """Python holds 1 and 1.0 equal, and a preset does not."""
    (tmp_path / "mine.yaml").write_text("dense_steps: 1.0\nmin_tokens: 0\n")
    mine = ask("a cat", preset=str(tmp_path / "mine.yaml"))
    carry_out(mine)
    (tmp_path / "mine.yaml").write_text("dense_steps: 1\nmin_tokens: 0\n")
    with pytest.raises(InputError, match=r"holds another run \(preset_rules.dense_steps was 1\.0 and is now 1\);"):
        carry_out(mine)


def test_a_rule_that_gives_a_default_value_makes_another_run(ask, tmp_path):
    """It takes back what an earlier rule has changed, where a rule without that key does not."""
    mine = ask("a cat", preset=str(tmp_path / "mine.yaml"))
    rules = 'steps: [{{match: "0-50%", floor: 0.3}}, {{match: "0-50%"{}}}]\nmin_tokens: 0\n'
    (tmp_path / "mine.yaml").write_text(rules.format(""))
    first = make_plan(replace(mine, output=None)).output
    carry_out(mine)
    (tmp_path / "mine.yaml").write_text(rules.format(", floor: 0.0"))
    assert make_plan(replace(mine, output=None)).output != first
    with pytest.raises(InputError, match=r"holds another run \(preset_rules.steps was "):
        carry_out(mine)


def test_of_the_first_format_only_presets_without_rules_are_known(tmp_path):
    """It tells a rule that was given all keys from none that was given fewer."""
    plain, ruled = ({"preset_rules": {"layers": layers, "steps": []}} for layers in ([], [{"match": "0"}]))
    for settings in (plain, ruled):
        (tmp_path / "run.json").write_text(json.dumps({"format": 1, "settings": settings, "prompts": ["a cat"]}))
        folder = RunFolder(tmp_path, settings, ("a cat",))
        if settings is plain:
            folder.check(overwrite=False)
        else:
            with pytest.raises(InputError, match=r"holds another run \(its format differs\)"):
                folder.check(overwrite=False)


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


def test_what_is_no_folder_of_a_run_is_refused_before_anything_is_loaded(ask, tmp_path, monkeypatch):
    out = tmp_path / "out"
    carry_out(ask("a cat"))
    monkeypatch.setattr(generate, "load_pipeline", None)
    shutil.rmtree(out / "0000-a-cat")
    (out / "0000-a-cat").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="0000-a-cat is there and is not a folder; move it away"):
            carry_out(ask("a cat", overwrite=overwrite))
    (out / "0000-a-cat").unlink()
    (out / "run.json").write_text('{"settings": ["model"]}')
    with pytest.raises(InputError, match=r"run\.json: holds no settings of a run; move it away or add --overwrite"):
        carry_out(ask("a cat"))
    (out / "run.json").unlink()
    (out / "run.json").mkdir()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"run\.json is there and is not a file; move it away"):
            carry_out(ask("a cat", overwrite=overwrite))


def test_overwrite_replaces_a_run_whose_prompts_cannot_be_read(ask, tmp_path):
    for prompts in ('{"a": 1}', "5", '[1, null, "a cat"]'):
        (tmp_path / "out" / "0002-a-cat").mkdir(parents=True)
        (tmp_path / "out" / "run.json").write_text(f'{{"settings": {{}}, "prompts": {prompts}}}')
        folder = RunFolder(tmp_path / "out", {}, ("a fox",))
        folder.check(overwrite=True)
        folder.begin()
        assert (tmp_path / "out" / "0002-a-cat").exists() == ("a cat" not in prompts)
        shutil.rmtree(tmp_path / "out")


def test_a_link_to_a_folder_that_lost_its_video_is_replaced(ask, tmp_path):
    carry_out(ask("a cat"))
    (tmp_path / "out" / "0000-a-cat").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "0000-a-cat").symlink_to(tmp_path / "elsewhere")
    assert carry_out(ask("a cat"))["kept"] == 1
    (tmp_path / "elsewhere" / "small.mp4").unlink()
    assert carry_out(ask("a cat"))["made"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, r"--output x+\.\.\.: the name is too long"),
        ("x/" * 2040, r"--output [x/]+\.\.\.: the name is too long"),
        ("caf\udce9", r"--output .*caf\\udce9: the name is not UTF-8"),
        ("c\0", "no file can have this name"),
    ],
    ids=["long name", "long path", "not UTF-8", "null byte"],
)
def test_names_that_no_file_can_have(name, message, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_pipeline", None)
    with pytest.raises(InputError, match=message):
        carry_out(ask("a cat", output=name))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_at_once_leaves_no_folder(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", None)
    with pytest.raises(TypeError):
        carry_out(ask("a cat"))
    assert not (tmp_path / "out").exists()
