"""Videos under the file names that VBench expects: `{prompt}-{index}.mp4`, one folder a run (dense, psa-3, ...).

The names are those of VBench's own instructions (https://github.com/Vchitect/VBench, prompts/README.md).
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psa_diffusers.errors import InputError

FOLDER = "vbench"
LONGEST_NAME = 255  # bytes, on every common file system


def file_name(prompt: str, sample: int) -> str:
    """The name of one video of a prompt; samples count from 0."""
    return f"{prompt}-{sample}.mp4"


def check_names(prompts: Sequence[str], samples: int) -> None:
    """Refuse prompts that cannot be file names, or that would share one.

    Raises:
        InputError: the first such prompt.
    """
    seen: set[str] = set()
    for prompt in prompts:
        shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
        if "/" in prompt or "\0" in prompt:
            raise InputError(f"--vbench: the prompt {shown!r} holds a character that no file name can ('/' or null)")
        size = len(os.fsencode(file_name(prompt, samples - 1)))
        if size > LONGEST_NAME:
            raise InputError(
                f"--vbench: the prompt {shown!r} makes a file name of {size} bytes; at most {LONGEST_NAME}"
            )
        if prompt in seen:
            raise InputError(f"--vbench: the prompt {shown!r} is given twice; use --samples for several videos of it")
        seen.add(prompt)


def lay_out(folder: Path, reports: Sequence[dict[str, Any]]) -> Path:
    """Link (or copy, where links cannot be) all finished videos to `folder/vbench/<run>/{prompt}-{index}.mp4`.

    Args:
        reports: what the prompts' report.json hold, each with its folder's name below `folder` under "folder".
    """
    target = folder / FOLDER
    for report in reports:
        for run, file in report["videos"].items():
            source = folder / report["folder"] / file
            place = target / run / file_name(report["prompt"], report["sample"])
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(source, place)
            except OSError:
                shutil.copyfile(source, place)
    return target
