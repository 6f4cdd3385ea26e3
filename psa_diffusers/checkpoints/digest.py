"""Tells whether a model's folder still holds the files that it held, without reading its weights."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from psa_diffusers.checkpoints.configurations import index_file, read_json
from psa_diffusers.checkpoints.modular import listed_modular_parts
from psa_diffusers.checkpoints.resolve import Model

CACHES = ("__pycache__",)


def folder_digest(model: Model) -> str | None:
    """32 hexadecimal digits for the names, sizes and modification times of what a local model's components load.

    The index counts and what the folders of its components hold, hidden files and caches left out: anything else, such
    as the videos of a run, may come and go beside them. None for a model of the hub.

    Raises:
        InputError: the index cannot be read.
    """
    if not os.path.isdir(model.source):
        return None
    file = index_file(model.kind)
    index = read_json(model.source, file)
    if model.kind.modular:
        parts = listed_modular_parts(index, model.source).values()
        folders = {Path(model.source, part.repository, part.subfolder) for part in parts}
    else:
        folders = {Path(model.source, name) for name, entry in index.items() if isinstance(entry, list)}
    files = [Path(model.source, file), *(found for folder in sorted(folders) for found in _files(folder))]
    rows = []
    for path in files:
        about = path.stat()
        rows.append((os.path.relpath(path, model.source), about.st_size, about.st_mtime_ns))
    return hashlib.sha256(json.dumps(sorted(set(rows))).encode()).hexdigest()[:32]


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in CACHES]
        # A link may lead nowhere: whether that file is needed shows when the model is loaded.
        yield from (path for name in names if not name.startswith(".") and (path := Path(place, name)).is_file())
