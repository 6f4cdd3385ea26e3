"""What type checkers and editors see: the code of README, docs and examples, and the types of public names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import psa_diffusers
import psa_kernels
import psa_presets
import psa_transformers
from psa_diffusers import Preset, list_presets, load_preset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader of a page has already, as its words say.
GIVEN = """from typing import Any
import torch
pipe: Any
latents: torch.Tensor
timesteps: torch.Tensor
text: torch.Tensor
"""
# The libraries' own types are not what is checked here, and take minutes to read.
CONFIGURATION = """[mypy]
python_version = 3.11
explicit_package_bases = true
check_untyped_defs = true
ignore_missing_imports = true
[mypy-torch.*,diffusers.*,transformers.*,numpy.*,scipy.*,PIL.*,triton.*]
follow_imports = skip
"""
# A line each, with what mypy must say of it.
MISTAKES = (
    ('apply_psa(pipe, presett="psa-3")', 'Unexpected keyword argument "presett" for "apply_psa"'),
    ("apply_psa(pipe).stats().density_sparce", '"RunStats" has no attribute "density_sparce"'),
    ("PSAProcessor(pipe).restor()", '"PSAProcessor" has no attribute "restor"'),
    ('load_preset("psa-3").at_densty(0.2)', '"Preset" has no attribute "at_densty"'),
    ("Preset(densty=0.2)", 'Unexpected keyword argument "densty" for "Preset"'),
    ('Preset(rule="counts")', "incompatible type \"Literal['counts']\""),
    ('Preset(block={"query": 128, "keys": 64})', 'expected "BlockKeys | BlockSizes"'),
    ('load_preset("psa-3").replace(dense_steps="0.3")', 'incompatible type "str"'),
    ('load_preset("psa-3").replace(layers=[{"match": "0-1", "dens": True}])', "incompatible type"),
    ("disable_psa()", 'Missing positional argument "pipe" in call to "disable_psa"'),
    ('psa_stats(pipe)["density"]', '"RunStats" is not indexable'),
    ("psa_attention(q, q, q, AttentionSpec(), return_stats=True)[1].densities", '"AttentionStats" has no attribute'),
    ("psa_attention(q, q, q)", "No overload variant"),
    ("select_blocks(q, q, AttentionSpec(), lists=None)", 'Unexpected keyword argument "lists"'),
    ("list_presets().lower()", '"list[str]" has no attribute "lower"'),
    ("from psa_diffusers import apply_pas", 'Module "psa_diffusers" has no attribute "apply_pas"'),
)


def code_of(page: Path) -> str:
    """The Python blocks of a page, in order."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def as_code(name: str) -> str:
    """A shipped preset as one would write it in Python."""
    settings = load_preset(name).model_dump(mode="json", exclude_unset=True)
    return f"Preset({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """All that mypy says, of pages, examples and mistakes in one run."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(CONFIGURATION)
    for page in PAGES:
        (folder / f"page_{page.stem}.py").write_text(GIVEN + code_of(page))
    names = f"from psa_diffusers import {', '.join(psa_diffusers.__all__)}\nfrom psa_kernels import *\n"
    (folder / "presets.py").write_text("from psa_diffusers import Preset\n" + "\n".join(map(as_code, list_presets())))
    lines = "\n".join(line for line, _ in MISTAKES)
    (folder / "mistakes.py").write_text(f"from typing import Any\n{names}pipe: Any\nq: Any\n{lines}\n")
    for example in (ROOT / "examples").glob("*.py"):
        (folder / f"example_{example.name}").write_text(example.read_text(encoding="utf-8"))
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    checked = sorted(each.name for each in folder.glob("*.py"))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", *checked]
    environment = {**os.environ, "MYPYPATH": path}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert f"(checked {len(checked)} source files)" in result.stdout, result.stdout + result.stderr
    return result.stdout


def errors_in(said: str, prefix: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(prefix) and ": error: " in line]


def test_the_code_of_readme_and_docs_type_checks(said):
    assert "PSAProcessor(pipe" in code_of(PAGES[0]) and "apply_psa(pipe" in code_of(PAGES[0])
    assert not errors_in(said, "page_")


def test_the_examples_type_check(said):
    assert not errors_in(said, "example_")


def test_shipped_presets_written_in_code_type_check(said):
    assert eval(as_code("psa-3"), {"Preset": Preset}) == load_preset("psa-3")
    assert not errors_in(said, "presets.py")


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_are_seen(said, line, message):
    number = 6 + [each for each, _ in MISTAKES].index(line)
    found = [each for each in errors_in(said, "mistakes.py:") if each.startswith(f"mistakes.py:{number}: ")]
    assert any(message in each for each in found), errors_in(said, "mistakes.py:")


def test_nothing_else_is_wrong(said):
    """Each public name of the package has a type, so that importing all of them is no mistake."""
    lines = {int(each.split(":")[1]) for each in errors_in(said, "mistakes.py:")}
    assert lines == set(range(6, 6 + len(MISTAKES)))
    assert len(errors_in(said, "")) == len(errors_in(said, "mistakes.py:"))


@pytest.mark.parametrize("package", [psa_diffusers, psa_transformers])
def test_what_type_checkers_see_is_what_there_is(package):
    source = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (checked,) = (
        node for node in source.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        seen |= {alias.asname: f"{node.module}.{alias.name}" for alias in node.names}
    homes = {name: f"{resolve_name(home, package.__name__)}.{name}" for name, home in package._HOMES.items()}
    version = {"__version__"} if package is psa_diffusers else set()
    assert seen == homes and set(dir(package)) == {*homes, *version}


def test_all_packages_say_that_they_are_typed():
    for package in (psa_diffusers, psa_kernels, psa_presets, psa_transformers):
        assert (Path(package.__file__).parent / "py.typed").is_file()
