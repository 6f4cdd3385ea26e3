"""What every benchmark writes beside its figures: where, when and with what they were measured."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from psa_diffusers.environment import hardware, versions


def publish(
    what: str, rows: list[dict[str, Any]], output: Path | None, *, device: str = "cpu", **settings: Any
) -> None:
    """Print one JSON document as the last line of stdout, and write it to `output` too if that is given."""
    result = document(what, rows, device=device, **settings)
    if output:
        write(result, output)
    print(json.dumps(result))


def document(
    what: str, rows: list[dict[str, Any]], *, device: str = "cpu", commit: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Rows with what they were measured on; the commit is git's HEAD unless given."""
    return {
        "what": what,
        **settings,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit or head(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }


def write(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def head() -> str:
    """Git's HEAD, abbreviated; empty outside a checkout, and where there is no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return found.stdout.strip()
