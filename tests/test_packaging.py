"""The package works from a wheel, an editable install and a checkout, and leaves the PyPI package `kernels` alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from psa_diffusers.checkpoints.kinds import PIPELINE_KINDS
from psa_diffusers.errors import EXTRAS, how_to_install, with_extra

ROOT = Path(__file__).resolve().parent.parent

USE_EVERYTHING = """
import psa_transformers
from psa_transformers import apply_psa
import psa_diffusers, psa_kernels, psa_diffusers.checkpoints.load
from psa_diffusers import PSAProcessor, apply_psa, list_presets, load_preset
assert load_preset("psa-3").name == "psa-3" and len(list_presets()) >= 10
print(psa_diffusers.__file__)
print(psa_kernels.__file__)
print(psa_transformers.__file__)
"""

SEE_KERNELS = """
import importlib.util
import psa_diffusers
from psa_diffusers import PSAProcessor
from diffusers.utils.import_utils import is_kernels_available
import kernels
assert kernels.__file__ == {file!r}, kernels.__file__
assert is_kernels_available()
from kernels import get_kernel
"""


def python(code: str, cwd: Path, *path: Path, arguments: Sequence[str] = ()) -> str:
    """Run code in a fresh interpreter that sees `path` and the installed dependencies; return what it printed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl"))


def test_the_wheel_holds_all_packages_presets_demo_and_template(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "psa_diffusers",
        "psa_kernels",
        "psa_presets",
        "psa_transformers",
        f"psa_diffusers-{version()}.dist-info",
    }
    for expected in (
        "psa_presets/configs/psa-3.yaml",
        "psa_diffusers/demo/model_index.json",
        "psa_diffusers/report/templates/report.html.j2",
        "psa_diffusers/py.typed",
        "psa_kernels/py.typed",
        "psa_presets/py.typed",
        "psa_transformers/py.typed",
        "psa_kernels/sparse/reference.py",
    ):
        assert expected in names
    weights = [name for name in names if name.startswith("psa_diffusers/demo/") and name.endswith(".safetensors")]
    assert len(weights) == 3
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]


def version() -> str:
    import psa_diffusers

    return psa_diffusers.__version__


def test_the_first_minute_works_from_the_wheel_alone(wheel, tmp_path):
    """In one process: where its packages come from, and then the command."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    small = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "2", "--output", "out"]
    code = f"{USE_EVERYTHING}\nimport runpy\nrunpy.run_module('psa_diffusers.cli', run_name='__main__')"
    command = ["--compare", "a large red circle moving right", *small]
    *places, said = python(code, tmp_path, site, arguments=command).splitlines()
    assert len(places) == 3 and all(Path(place).is_relative_to(site) for place in places)
    summary = json.loads(said)
    assert (summary["status"], summary["model"], summary["preset"]) == ("complete", "demo", "psa-3")
    assert summary["prompts"][0]["ssim"] > 0 and "Where the seconds went" in (tmp_path / "out/report.html").read_text()


def test_a_checkout_works_without_installing(tmp_path):
    """From inside it and from elsewhere, one after the other: between them all but other packages is forgotten."""
    code = f"""
import os, sys
path = [*sys.path]
for folder in ({str(ROOT)!r}, {str(tmp_path)!r}):
    os.chdir(folder)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("psa_")]:
        del sys.modules[name]
    exec({USE_EVERYTHING!r})
"""
    places = python(code, tmp_path, ROOT).split()
    assert len(places) == 6 and all(Path(place).is_relative_to(ROOT) for place in places)


def test_the_version_is_in_one_place(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    with zipfile.ZipFile(wheel) as opened:
        metadata = opened.read(f"psa_diffusers-{version()}.dist-info/METADATA").decode()
    assert f"\nVersion: {version()}\n" in metadata


def test_every_extra_that_is_named_brings_its_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert package in {re.split(r"[<>=;\s]", requirement)[0] for requirement in extras[extra]}
        assert how_to_install(package) == f"pip install 'psa-diffusers[{extra}]'"
    needed = {package for kind in PIPELINE_KINDS.values() for package in kind.packages}
    assert needed == {"cosmos_guardrail", "torchvision"} <= set(EXTRAS)


def test_what_a_library_misses_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    said = "transformer: Using `bitsandbytes` 4-bit quantization requires bitsandbytes"
    assert with_extra(said) == f"{said} (pip install 'psa-diffusers[quantised]')"
    assert with_extra("Using torchao needs a newer torch") == "Using torchao needs a newer torch"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("first", ["checkout", "package"])
def test_diffusers_still_sees_the_package_kernels(first, tmp_path):
    """A stand-in with the metadata of the PyPI package is what diffusers finds, wherever it is on the path."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '99.0'\ndef get_kernel(*_, **__): ...\n")
    metadata = tmp_path / "kernels-99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    path = [ROOT, ROOT / "kernels", tmp_path]
    python(SEE_KERNELS.format(file=str(package / "__init__.py")), ROOT, *(path if first == "checkout" else path[::-1]))
