"""psa-generate in a child process that is stopped, or may write only so much; with a tiny random model.

The child is a fork of this process, which has imported everything: so a round takes a second, not ten.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from psa_diffusers.cli.generate import generate_app  # noqa: E402
from psa_diffusers.cli.shell import run_command  # noqa: E402
from psa_diffusers.report.video import read_video  # noqa: E402
from psa_testing.tiny_pipelines import tiny_wan  # noqa: E402

torch.set_num_threads(1)  # a fork has no threads but its own
PROMPTS = ("a cat", "a dog", "a fox")
FRAMES = 5


@dataclass(frozen=True)
class Outcome:
    """Exit code (negative: the signal that ended it), seconds, and what was said on stderr."""

    code: int
    seconds: float
    said: str


def prepare(folder: Path) -> list[str]:
    """Make the model, preset and prompts file; gives the arguments of the run but its output folder."""
    tiny_wan(num_layers=2).save_pretrained(folder / "model")
    (folder / "small.yaml").write_text("block: {query: 32, key: 16}\nmin_tokens: 0\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    sizes = f"--steps 2 --height 64 --width 64 --frames {FRAMES} --fps 8".split()
    return [
        str(folder / "prompts.txt"),
        "--model",
        str(folder / "model"),
        "--preset",
        str(folder / "small.yaml"),
        *sizes,
    ]


def generate(
    arguments: list[str],
    log: Path,
    *,
    stop_after: float | None = None,
    by: int = signal.SIGKILL,
    most: int | None = None,
) -> Outcome:
    """Run psa-generate in a child, stopped by a signal after some seconds, or with files of at most `most` bytes."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            with open(log, "wb", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if most is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            code = run_command("psa-generate", generate_app, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    ended, status = 0, 0
    while stop_after is not None and not ended and time.monotonic() - started < stop_after:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if stop_after is not None:
            os.kill(child, by)
        _, status = os.waitpid(child, 0)
    said = log.read_text(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - started, said)


def videos(output: Path) -> dict[str, np.ndarray]:
    """The frames of every finished prompt by its folder's name; each must be complete."""
    found = {}
    for folder in sorted(output.glob("[0-9]*")):
        assert sorted(path.name for path in folder.iterdir()) == ["report.json", "small.mp4"], (
            f"half a folder: {folder}"
        )
        frames = read_video(folder / "small.mp4").frames
        assert len(frames) == FRAMES, f"half a video: {folder}"
        found[folder.name] = frames
    return found


def check_equal(output: Path, expected: dict[str, np.ndarray]) -> None:
    """A folder holds what an undisturbed run made, and nothing else, hidden or not."""
    found = videos(output)
    assert list(found) == list(expected), f"videos lost or doubled: {list(found)}"
    for name, frames in found.items():
        assert np.array_equal(frames, expected[name]), f"other frames: {name}"
    left = sorted(path.name for path in output.iterdir())
    assert left == sorted([*expected, "report.html", "run.json"]), f"leftovers: {left}"
