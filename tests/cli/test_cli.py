"""The commands as a user meets them: help, lists, one-line errors, exit codes, one JSON document."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from psa_diffusers import __version__
from psa_diffusers.checkpoints.aliases import MODELS
from psa_diffusers.cli.calibrate import calibrate_app
from psa_diffusers.cli.compare import compare_app
from psa_diffusers.cli.generate import generate_app
from psa_diffusers.cli.inspect import inspect_app
from psa_diffusers.cli.options import LISTS, RUN_OPTIONS
from psa_diffusers.cli.shell import run_command
from psa_diffusers.errors import InputError
from psa_diffusers.report.video import write_video
from psa_diffusers.runs import generate
from psa_diffusers.runs.request import Request
from psa_testing.tiny_pipelines import tiny_wan

ROOT = Path(__file__).parents[2]
SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2"]
OPTIONS = {
    *("--model", "--preset", "--compare", "--output", "--seed", "--steps", "--guidance", "--height", "--width"),
    *(
        "--frames",
        "--fps",
        "--negative-prompt",
        "--dtype",
        "--device",
        "--offload",
        "--compile",
        "--cuda-graphs",
        "--num-processes",
        "--image",
        "--overwrite",
        "--strict",
    ),
    *("--num-inference-steps", "--num-frames", "--guidance-scale"),  # as diffusers says it
    *("--preset-2", "--density", "--lora", "--lora-2", "--samples", "--vbench", "--check", "--list", "--version"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "wan"
    tiny_wan(num_layers=2).save_pretrained(folder)
    return str(folder)


def psa_generate(*arguments: str) -> int:
    return run_command("psa-generate", generate_app, arguments)


def in_a_process(*arguments: str, cwd: Path, function: str = "generate") -> subprocess.CompletedProcess:
    program = f"import sys; from psa_diffusers.cli.{function} import {function}; sys.argv[0] = 'psa'; {function}()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_help_names_every_option_and_no_other():
    result = CliRunner().invoke(generate_app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0
    for option in OPTIONS:
        assert re.search(rf"{option}[ ,]", result.output), option
    assert "Examples" in result.output
    parameters = typer.main.get_command(generate_app).params
    assert {name for parameter in parameters for name in parameter.opts} - {"prompts", "-o"} == OPTIONS


def test_help_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from psa_diffusers.cli.generate import generate_app\n"
        "from psa_diffusers.cli.shell import run_command\n"
        "run_command('psa-generate', generate_app, ['--help'])\n"
        "sys.exit(' '.join({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_list_shows_every_model_and_preset(capsys):
    assert psa_generate("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    for card in MODELS.values():
        assert any(line.split()[:2] == [card.name, card.hub_id or "(bundled)"] for line in lines)
    assert not any(line.split()[:1] == ["example"] for line in lines)
    for preset in ("psa-1", "psa-2", "psa-3", "psa-4", "psa-5", "dense"):
        assert any(line.split()[:1] == [preset] and len(line.split()) > 3 for line in lines)


def test_version(capsys):
    assert psa_generate("--version") == 0
    assert "torch 2" in capsys.readouterr().out


COMMANDS = {"generate": generate_app, "compare": compare_app, "inspect": inspect_app, "calibrate": calibrate_app}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_version_and_short_and_long_names(name, capsys):
    assert run_command(f"psa-{name}", COMMANDS[name], ["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"psa-diffusers {__version__}, python 3")
    names = [tuple(parameter.opts) for parameter in typer.main.get_command(COMMANDS[name]).params]
    if name != "compare":
        long = {"--steps": "--num-inference-steps", "--frames": "--num-frames", "--guidance": "--guidance-scale"}
        assert set(long.items()) <= set(names)


# What these replace, write or aim at is each command's own; `dense` has no mask to be drawn.
OWN_MEANING = {"--output", "--overwrite", "--preset"}


def test_an_option_means_the_same_in_all_commands():
    seen = {}
    for name, app in COMMANDS.items():
        own = OWN_MEANING | ({"--density"} if name == "calibrate" else set())  # there it is a target
        for parameter in typer.main.get_command(app).params:
            for option in {opt for opt in parameter.opts if opt.startswith("--")} - own:
                seen.setdefault(option, {})[name] = (tuple(parameter.opts), parameter.help, parameter.default)
    shared = {option: told for option, told in seen.items() if len(told) > 1}
    assert {option for option, told in shared.items() if len(set(told.values())) > 1} == set()
    everywhere = {
        "--model",
        "--steps",
        "--guidance",
        "--height",
        "--width",
        "--frames",
        "--dtype",
        "--device",
        "--lora",
    }
    assert all(set(seen[option]) == {"generate", "inspect", "calibrate"} for option in everywhere)
    assert set(seen["--version"]) == set(COMMANDS) and set(seen["--seed"]) == {"generate", "inspect"}


def test_every_shared_option_reaches_the_request():
    assert set(RUN_OPTIONS) <= {field.name for field in fields(Request)}
    defaults = {field.name: field.default for field in fields(Request)}
    for name, (_, default) in RUN_OPTIONS.items():
        assert defaults[name] == (() if name in LISTS else default)


def test_diffusers_names_mean_the_same(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(generate, "run", lambda plan, place: seen.append(plan))
    short = ["--frames", "5", "--steps", "2", "--guidance", "3"]
    long = ["--num-frames", "5", "--num-inference-steps", "2", "--guidance-scale", "3"]
    for given in (short, long):
        assert psa_generate("--model", model, "--height", "64", "--width", "64", *given, "a cat") == 0
    first, second = (plan.settings.to_dict() for plan in seen)
    assert first == second and (first["frames"], first["steps"], first["guidance"]) == (5, 2, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "wann", "a cat"], "--model wann: no such model (did you mean wan?)"),
        (["--frames", "abc", "a cat"], "Invalid value for '--frames'"),
        (["--colour", "red"], "No such option: --colour"),
        (["--preset", "nothing.yaml", "a cat"], "--preset nothing.yaml"),
        (["--density", "1.2", "a cat"], "--density 1.2: must be above 0 and up to 1, a share of dense attention"),
        (["--seed", "-5", "a cat"], "--seed -5: must be from 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, capsys, model):
    if "--model" not in arguments:
        arguments = ["--model", model, *arguments]
    assert psa_generate(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("psa-generate: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "1000000000"], "--height 192 --width 1000000000 --frames 33: the frames alone are 17,703 GiB"),
        (["--frames", "1000000001"], "--height 192 --width 192 --frames 1000000001: the frames alone are 102,997 GiB"),
        (["--lora", "x" * 300], f"--lora {'x' * 300}: no such file"),
    ],
)
def test_what_no_machine_can_do_is_refused_before_the_model_is_loaded(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_pipeline", None)
    assert psa_generate(*arguments, "a cat") == 2
    assert f"psa-generate: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "app", "given"),
    [
        ("psa-generate", generate_app, ["a cat", "-o", "{}"]),
        ("psa-inspect", inspect_app, ["a cat", "-o", "{}.png"]),
        ("psa-compare", compare_app, ["a.mp4", "b.mp4", "-o", "{}"]),
        ("psa-compare", compare_app, ["a.mp4", "{}.mp4"]),
    ],
)
@pytest.mark.parametrize(("bad", "why"), [("x" * 300, "too long"), ("caf\udce9", "not UTF-8")])
def test_names_that_no_file_can_have(name, app, given, bad, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(name, app, [each.format(bad) for each in given]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"the name is {why}" in errors


def test_a_command_without_streams(model, tmp_path, monkeypatch):
    """As the shell starts it with `>&- 2>&-`."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)
    assert psa_generate("--model", model, *SMALL, "--preset", "dense", "-o", str(tmp_path / "out"), "a cat") == 0
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("psa-generate", "; finished prompts are kept, run the same command again"),
        ("psa-calibrate", "; what was measured is kept, run the same command again"),
        ("psa-compare", ""),
        ("psa-inspect", ""),
    ],
)
def test_a_failure_says_what_this_command_keeps(name, kept, capsys):
    app = typer.Typer()

    @app.command()
    def fail(what: str) -> None:
        raise {"full": OSError(28, "No space left"), "alloc": RuntimeError("DefaultCPUAllocator: no")}[what]

    assert run_command(name, app, ["full"]) == 1
    assert capsys.readouterr().err == f"{name}: error: cannot write: [Errno 28] No space left{kept}\n"
    assert run_command(name, app, ["alloc"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: error: out of memory") and kept.partition(",")[0] in said


def test_no_arguments_shows_the_help(capsys):
    assert psa_generate() == 2
    output = capsys.readouterr()
    assert "Examples" in output.out
    assert "error: nothing given" in output.err


def test_a_run_in_its_own_process(model, tmp_path):
    prompt = "<script>alert('x')</script> ../../x " + "🎉" + "long " * 60
    (tmp_path / "prompts.txt").write_text("# two\na cat\n")
    done = in_a_process(
        "--model", model, *SMALL, "--preset", "dense", "--output", "out", "prompts.txt", prompt, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["prompts"][1]["prompt"] == prompt.strip()
    assert summary["prompts"][1]["folder"].startswith("0001-script-alert-x-script-x-long")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert" not in html
    assert "%|" not in done.stderr  # no progress bars where nobody watches
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_interruption_says_how_to_continue(model, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_video", interrupt)
    assert psa_generate("--model", model, *SMALL, "--preset", "dense", "-o", str(tmp_path / "out"), "a cat") == 130
    output = capsys.readouterr()
    assert "interrupted, 1 of 1 prompts missing; run the same command again to continue" in output.err
    assert json.loads(output.out.splitlines()[-1])["status"] == "interrupted"


def test_other_failures_have_code_1(model, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("the kernel\nwent away")

    monkeypatch.setattr(generate, "generate_video", fail)
    assert psa_generate("--model", model, *SMALL, "--preset", "dense", "-o", str(tmp_path / "out"), "a cat") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "psa-generate: error: RuntimeError: the kernel went away"


def test_strict_fails_where_attention_would_be_dense(model, tmp_path, capsys):
    code = psa_generate("--model", model, *SMALL, "--strict", "-o", str(tmp_path / "out"), "a cat")
    assert code == 1
    errors = capsys.readouterr().err
    assert "psa-generate: error: strict: attention would be dense: the sequence of 32 tokens is shorter" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "0000-a-cat").exists()


def test_psa_compare(tmp_path):
    frames = np.random.default_rng(0).uniform(0, 1, (5, 32, 32, 3)).astype(np.float32)
    write_video(tmp_path / "a.mp4", frames, 8)
    write_video(tmp_path / "b.mp4", frames * 0.5, 8)
    done = in_a_process("a.mp4", "b.mp4", "--output", "out", cwd=tmp_path, function="compare")
    assert done.returncode == 0, done.stderr
    assert 3 < json.loads(done.stdout.splitlines()[-1])["psnr"] < 30
    again = in_a_process("a.mp4", "b.mp4", "--output", "out", cwd=tmp_path, function="compare")
    assert again.returncode == 2
    assert again.stderr.startswith("psa-compare: error: --output out: side-by-side.mp4 is already there")


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_command_leaves_the_process_its_signal_handlers(monkeypatch):
    before, during = handlers(), []
    monkeypatch.setattr("psa_diffusers.checkpoints.listing.listing", lambda: during.extend(handlers()) or "")
    assert psa_generate("--list") == 0
    assert handlers() == before
    assert len(during) == 2 and not set(during) & set(before)


def test_a_command_says_that_it_was_stopped(monkeypatch, capsys):
    """psa-generate says more, below."""
    monkeypatch.setattr("psa_diffusers.report.compare.compare_files", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert run_command("psa-compare", compare_app, ["a.mp4", "b.mp4"]) == 130
    assert capsys.readouterr().err == "psa-compare: error: interrupted\n"


def test_a_stop_that_was_swallowed_is_carried_out_at_the_next_step(model, tmp_path, monkeypatch, capsys):
    """An exception that a signal's handler raises inside a callback is ignored by Python."""
    load = generate.load_pipeline

    def load_and_signal(*arguments, **settings):
        pipe = load(*arguments, **settings)
        encode = pipe.encode_prompt

        def encode_prompt(*values, **named):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            return encode(*values, **named)

        pipe.encode_prompt = encode_prompt
        return pipe

    monkeypatch.setattr(generate, "load_pipeline", load_and_signal)
    code = psa_generate("--model", model, *SMALL, "--preset", "dense", "-o", str(tmp_path / "out"), "a cat")
    said = capsys.readouterr().err
    assert code == 130 and "interrupted, 1 of 1 prompts missing" in said and "error" not in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_a_stop_that_became_another_error_is_still_a_stop(model, tmp_path, monkeypatch, capsys):
    """What a signal's handler raises while weights are read comes out as an error about their file."""
    stops = [True, False]

    def load_pipeline(*arguments, **settings):
        if stops.pop(0):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        raise InputError("--model m: cannot be loaded")

    monkeypatch.setattr(generate, "load_pipeline", load_pipeline)
    command = ("--model", model, *SMALL, "--preset", "dense", "-o", str(tmp_path / "out"), "a cat")
    assert psa_generate(*command) == 130
    assert "interrupted, 1 of 1 prompts missing" in capsys.readouterr().err
    # The next run has an error of its own, and no stop.
    assert psa_generate(*command) == 2
    assert "error: --model m: cannot be loaded" in capsys.readouterr().err
