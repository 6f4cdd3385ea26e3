"""Several processes that share the prompts of one run: none is made twice, and one that dies loses its own only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from psa_diffusers.errors import InputError
from psa_diffusers.runs import generate, stopping
from psa_diffusers.runs import processes as workers
from psa_diffusers.runs.folder import RunFolder
from psa_diffusers.runs.plan import make_plan
from psa_diffusers.runs.processes import run_shared
from psa_diffusers.runs.rank import Place
from psa_diffusers.runs.request import Request
from psa_testing.tiny_pipelines import tiny_wan

ROOT = Path(__file__).parents[2]
PROMPTS = ("a cat", "a dog", "a fox", "a hen", "an owl")


@pytest.fixture
def plan(tmp_path):
    tiny_wan(num_layers=1).save_pretrained(tmp_path / "wan")
    request = Request(
        prompts=PROMPTS, model=str(tmp_path / "wan"), preset="dense", output=str(tmp_path / "out"),
        steps=1, height=32, width=32, frames=1,
    )  # fmt: skip
    return make_plan(request)


@pytest.fixture
def forked(forks, monkeypatch):
    """The processes of a run fork from one that has imported what they need, which spares each some seconds.

    They are given what processes that spawn are given. `tests/cli/test_prompt_sources.py` runs some of those.
    """
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: {"spawn": forks}[method])


def log_of(plan) -> Path:
    """Which process began which prompt."""
    return plan.output.with_name("log")


def watched_work(plan, place: Place) -> None:
    """As `workers.work`, but a process that begins with the fox is killed."""
    original = generate.generate_video

    def generate_video(pipe, plan, prompt, *rest):
        with log_of(plan).open("a") as file:
            file.write(f"{place.rank}:{prompt}\n")
        if prompt == "a fox":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(pipe, plan, prompt, *rest)

    generate.generate_video = generate_video
    workers.work(plan, place)


def wait_for_the_first(plan) -> None:
    end = time.monotonic() + 60
    while not list(plan.output.glob("0*/report.json")):
        assert time.monotonic() < end, "no prompt is done"
        time.sleep(0.05)


def late_work(plan, place: Place) -> None:
    """As `workers.work`, but the second process begins when the first has made something."""
    if place.rank == 1:
        wait_for_the_first(plan)
    workers.work(plan, place)


def endless_work(plan, place: Place) -> None:
    """As `workers.work`, but every prompt but the first takes until somebody stops it."""
    original = generate.generate_video

    def generate_video(pipe, plan, prompt, *rest):
        if prompt == PROMPTS[0]:
            return original(pipe, plan, prompt, *rest)
        wait_for_the_first(plan)
        log_of(plan).with_name(f"begun-{place.rank}").touch()
        time.sleep(60)
        raise AssertionError("nobody stopped it")

    generate.generate_video = generate_video
    workers.work(plan, place)


def folders(plan) -> list[str]:
    return sorted(path.name for path in plan.output.iterdir() if path.is_dir())


def test_a_process_that_dies_loses_its_prompt_and_a_rerun_makes_it(plan, forked, capsys):
    summary = run_shared(plan, 2, watched_work)
    assert (summary["status"], summary["made"], summary["missing"]) == ("incomplete", 4, 1)
    begun = [line.split(":")[1] for line in log_of(plan).read_text().splitlines()]
    assert sorted(begun) == sorted(PROMPTS)
    assert "ended with exit code -9" in capsys.readouterr().err
    assert [name for name in folders(plan) if not name.startswith(".")] == [
        "0000-a-cat", "0001-a-dog", "0003-a-hen", "0004-an-owl",
    ]  # fmt: skip
    summary = generate.run(plan)
    assert (summary["status"], summary["made"], summary["kept"]) == ("complete", 1, 4)
    assert len(folders(plan)) == len(PROMPTS) and not [name for name in folders(plan) if name.startswith(".")]
    assert [entry["prompt"] for entry in summary["prompts"]] == list(PROMPTS)
    alone = replace(plan, output=plan.output.with_name("alone"))
    generate.run(alone)
    for name in folders(plan):
        assert (plan.output / name / "dense.mp4").read_bytes() == (alone.output / name / "dense.mp4").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_parent_stops_all_and_leaves_nothing_half_made(plan, forked, number):
    """Only the parent gets the signal, as from a job scheduler: its processes clean up before it ends."""

    def stop():
        end = time.monotonic() + 60
        while len(list(plan.output.parent.glob("begun-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    with stopping.listening(), pytest.raises(generate.Interrupted) as stopped:
        thread.start()
        run_shared(plan, 2, endless_work)
    thread.join()
    summary = stopped.value.summary
    assert (summary["made"], summary["missing"]) == (1, 4) and Path(summary["report"]).is_file()
    assert sorted(path.name for path in plan.output.iterdir()) == ["0000-a-cat", "report.html", "run.json"]


def test_overwrite_replaces_an_older_run_once(plan, forked):
    """A process that overwrote too would throw away what the others have made."""
    generate.run(replace(plan, prompts=("a cow", *PROMPTS[1:])))
    before = {name: (plan.output / name / "dense.mp4").stat().st_mtime_ns for name in folders(plan)}
    summary = run_shared(replace(plan, overwrite=True), 2, late_work)
    assert (summary["status"], summary["made"], summary["kept"]) == ("complete", 5, 0)
    assert [entry["prompt"] for entry in summary["prompts"]] == list(PROMPTS)
    assert not [name for name in folders(plan) if name.endswith("cow")]
    for name in folders(plan):
        assert (plan.output / name / "dense.mp4").stat().st_mtime_ns != before.get(name)


def test_the_first_of_launched_processes_waits_for_the_others(plan):
    """The second is at a prompt still when the first has nothing left to make."""
    two = replace(plan, prompts=PROMPTS[:2])
    folder = RunFolder(two.output, two.settings.to_dict(), two.prompts, "together")
    folder.check(overwrite=False)
    folder.begin()
    alone = replace(two, output=two.output.with_name("alone"))
    generate.run(alone)
    begun, summaries = threading.Event(), []

    def second():
        with folder.claim(1) as mine, folder.writing(1) as path:
            assert mine
            begun.set()
            wait_for_the_first(two)
            time.sleep(1)
            shutil.copytree(alone.output / folder.names[1], path, dirs_exist_ok=True)

    other = threading.Thread(target=second)
    other.start()
    assert begun.wait(60)
    summaries.append(generate.run(two, Place(0, 2, 0, "together")))
    other.join(60)
    assert (summaries[0]["status"], summaries[0]["missing"]) == ("complete", 0)


def test_processes_may_begin_at_once(tmp_path):
    """Each writes run.json, by way of a file of one name."""
    folders = [RunFolder(tmp_path, {"seed": 0}, PROMPTS, "together") for _ in range(4)]
    starting = threading.Barrier(len(folders), timeout=10)

    def begin(folder: RunFolder) -> None:
        for _ in range(10):
            starting.wait()
            folder.begin()

    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(begin, folders))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text()) == folders[0].contents


def test_a_prompt_is_claimed_once(plan):
    first, second = (RunFolder(plan.output, plan.settings.to_dict(), PROMPTS, "together") for _ in range(2))
    first.check(overwrite=False)
    first.begin()
    with first.claim(0) as mine, second.claim(0) as other:
        assert mine and not other
        (plan.output / ".0000-a-cat.partial").mkdir()
        second.begin()  # what another process is filling stays
        assert (plan.output / ".0000-a-cat.partial").is_dir()
    with second.claim(0) as other:
        assert not other, "the first one failed, and so would this one"
    with RunFolder(plan.output, plan.settings.to_dict(), PROMPTS, "later").claim(0) as mine:
        assert mine


def test_what_several_processes_cannot_do_is_refused(plan, monkeypatch):
    settings = replace(plan.settings, device="cuda:1")
    with pytest.raises(InputError, match="--device cuda:1: 2 processes need a device each"):
        run_shared(replace(plan, settings=settings), 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = replace(plan.settings, device="cuda")
    with pytest.raises(InputError, match="--num-processes 2: this machine has 1 CUDA devices"):
        run_shared(replace(plan, settings=settings), 2)
    with pytest.raises(InputError, match="--overwrite: not under accelerate launch"):
        workers.check_devices(replace(plan, overwrite=True), 1, overwrite_alone=True)


def test_accelerate_launch_shares_a_prompts_file(plan, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "psa_diffusers.cli", "--model", plan.model.source, "--preset", "dense", "--output", "out"]
    size = ["--steps", "1", "--height", "32", "--width", "32", "--frames", "1", "--device", "cpu", "prompts.txt"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command, *size], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    documents = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(documents) == 1 and documents[0]["status"] == "complete" and documents[0]["missing"] == 0
    assert len(documents[0]["prompts"]) == 3 and (tmp_path / "out" / "report.html").is_file()
