"""The configuration files of a checkpoint, in a folder or on the hub."""

import json
import os
from pathlib import Path
from typing import Any

from psa_diffusers.checkpoints.hub import hub_file
from psa_diffusers.checkpoints.modular import MODULAR_INDEX
from psa_diffusers.errors import InputError
from psa_diffusers.families.pipeline_kind import PipelineKind

INDEX = "model_index.json"


def index_file(kind: PipelineKind) -> str:
    """The name of the file that lists the components of a pipeline."""
    return MODULAR_INDEX if kind.modular else INDEX


def read_json(source: str, file: str, revision: str | None = None) -> dict[str, Any]:
    """A file of a folder or of a repository of the hub.

    Raises:
        InputError: it cannot be had, or is no JSON object.
    """
    path = Path(source, file) if os.path.isdir(source) else _from_hub(source, file, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model {source}: cannot read {file} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise InputError(f"--model {source}: {file} is not a JSON object")
    return content


def _from_hub(repository: str, file: str, revision: str | None) -> Path:
    absent = f"it has no {file}, so it is not a saved pipeline"
    return hub_file(f"--model {repository}", "model", repository, file, absent, revision)
