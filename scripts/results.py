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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "what": what,
        **settings,
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
