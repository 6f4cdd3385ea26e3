"""Prompts from pipes and stdin, through the whole command: read once, remembered as words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.inspect import inspect_app
from psa_diffusers.cli.shell import run_command
from psa_testing.tiny_pipelines import tiny_wan

ROOT = Path(__file__).parents[2]
SMALL = ["--height", "32", "--width", "32", "--frames", "1", "--steps", "1", "--preset", "dense", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "wan"
    tiny_wan(num_layers=1).save_pretrained(folder)
    return str(folder)


def in_bash(arguments: str, model: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    """`psa-generate` with these arguments, which bash reads."""
    command = f"'{sys.executable}' -m psa_diffusers.cli --model '{model}' {' '.join(SMALL)} -o out {arguments}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **more
    )


def test_a_pipe_serves_several_processes_and_stdin_goes_on_with_its_run(model, tmp_path):
    done = in_bash("--num-processes 2 <(printf 'a cat\\na dog\\n')", model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["made"] == 2
    assert json.loads((tmp_path / "out" / "run.json").read_text())["prompts"] == ["a cat", "a dog"]
    again = in_bash("-", model, tmp_path, input="a cat\na dog\n")
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout.splitlines()[-1])
    assert (summary["made"], summary["kept"]) == (0, 2)


@pytest.mark.parametrize("name", ["prompts.csv", "prompts/", "prompts", "/dev/fd/987"])
@pytest.mark.parametrize("command", ["psa-generate", "psa-inspect"])
def test_no_video_of_a_file_name(command, name, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    app = generate_app if command == "psa-generate" else inspect_app
    output = "out" if command == "psa-generate" else "out.png"
    assert run_command(command, app, ["--model", model, "-o", output, name]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"{command}: error: prompt file {name}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
