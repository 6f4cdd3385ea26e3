"""LoRA in whole runs: in the videos, in the settings that decide whose folder it is, and in the report."""

import json

import pytest

from psa_diffusers.calibrate import runner
from psa_diffusers.cli.calibrate import calibrate_app
from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.inspect import inspect_app
from psa_diffusers.cli.shell import run_command
from psa_diffusers.errors import InputError
from psa_diffusers.runs import inspection
from psa_diffusers.runs.plan import make_plan
from psa_testing.lora_files import save_lora
from psa_testing.tiny_runs import carry_out


@pytest.fixture
def asked(ask, one_thread):
    def make(*lora, **changes):
        given = {"preset": "dense", "steps": 2, "lora": tuple(map(str, lora)), **changes}
        return ask("a cat", **given)

    return make


def test_the_video_depends_on_it_and_the_report_shows_it(asked, tmp_path):
    file = save_lora(tmp_path / "my_style.safetensors")
    videos = []
    for number, lora in enumerate([(), (f"{file}:0.5",), (f"{file}:1.5",)]):
        carry_out(asked(*lora, output=str(tmp_path / str(number))))
        videos.append((tmp_path / str(number) / "0000-a-cat" / "dense.mp4").read_bytes())
    assert len(set(videos)) == 3
    (entry,) = json.loads((tmp_path / "1" / "run.json").read_text())["settings"]["loras"]
    assert entry == {"lora": str(file), "weight": 0.5, "digest": entry["digest"], "into": ["transformer"]}
    page = (tmp_path / "1" / "report.html").read_text()
    assert f"{file}, weight 0.5, in transformer, SHA-256 {entry['digest']}" in page
    assert "LoRA" not in (tmp_path / "0" / "report.html").read_text()


def test_another_file_of_the_same_name_is_another_run(asked, tmp_path):
    file = save_lora(tmp_path / "style.safetensors")
    first = make_plan(asked(file, output=None))
    assert first.output == make_plan(asked(file, output=None)).output
    carry_out(asked(file))
    assert carry_out(asked(file))["kept"] == 1
    save_lora(file, seed=1)
    assert first.output != make_plan(asked(file, output=None)).output
    with pytest.raises(InputError, match=r"holds another run .loras was"):
        carry_out(asked(file))


def test_a_folder_of_a_version_without_lora_is_continued(asked, tmp_path):
    carry_out(asked())
    assert "loras" not in json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    with pytest.raises(InputError, match=r"holds another run .loras was null and is now"):
        carry_out(asked(save_lora(tmp_path / "style.safetensors")))


def test_what_fits_in_part_is_told_everywhere(asked, tmp_path, capsys):
    file = save_lora(tmp_path / "deep.safetensors", layers=3)
    summary = carry_out(asked(file))
    told = f"--lora {file}: 4 of its 12 weights have no place in the model: blocks.2"
    assert summary["prompts"][0]["warnings"][0].startswith(told)
    assert f"warning: {told}" in capsys.readouterr().err
    assert told in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("fits", [True, False])
def test_the_command_takes_several_and_says_in_one_line_what_is_wrong(saved, tmp_path, capfd, fits):
    good = save_lora(tmp_path / "good.safetensors")
    other = save_lora(tmp_path / "other.safetensors", seed=1, width=64 if fits else 96)
    command = ["--model", str(saved / "wan"), "--preset", "dense", "--device", "cpu", "--height", "64", "--width", "64"]
    command += ["--frames", "5", "--steps", "1", "-o", str(tmp_path / "out"), "a cat"]
    code = run_command("psa-generate", generate_app, ["--lora", f"{good}:0.5", "--lora", str(other), *command])
    said = capfd.readouterr()
    if fits:
        assert code == 0 and json.loads(said.out)["status"] == "complete"
        settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
        assert [entry["weight"] for entry in settings["loras"]] == [0.5, 1.0]
        return
    assert code == 2 and said.out == ""
    assert said.err.startswith(f"psa-generate: error: --lora {other}: does not fit the model: ")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("room", "command", "options"),
    [
        (inspection, inspect_app, ["a cat", "-o", "mask.png"]),
        (runner, calibrate_app, ["--prompts", "prompts.txt", "--density", "0.3", "-o", "mine.yaml"]),
    ],
)
def test_the_other_commands_load_it_too(room, command, options, saved, tmp_path, monkeypatch, capsys):
    loaded = []

    def load_pipeline(*arguments, loras, **settings):
        loaded.extend(loras)
        raise InputError("enough is seen")

    monkeypatch.setattr(room, "load_pipeline", load_pipeline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat {number}" for number in range(8)))
    file = save_lora(tmp_path / "style.safetensors")
    where = ["--model", str(saved / "wan"), "--height", "64", "--width", "64", "--frames", "5", "--device", "cpu"]
    assert run_command("psa", command, [*options, *where, "--lora", f"{file}:0.5"]) == 2
    assert "enough is seen" in capsys.readouterr().err
    assert [(lora.file, lora.weight) for lora in loaded] == [(file, 0.5)]
