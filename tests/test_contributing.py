"""CONTRIBUTING.md is true: each of its answers exists, and its map names what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ANSWERS = re.findall(r"^\| (.+\?) \| `(.+?)` \| `(.+?)` \|$", TEXT, re.MULTILINE)


def has_name(source: str, dotted: str) -> bool:
    """Whether a module defines a function, a class, a constant, or a method of one of its classes."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in dotted.split("."):
        for node in body:
            targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            if part in names:
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


def section(title: str) -> str:
    return TEXT.split(f"\n{title}\n")[1].split("\n## ")[0].split("\n### ")[0]


def test_there_are_six_questions():
    assert len(ANSWERS) == 6


@pytest.mark.parametrize(("question", "file", "name"), ANSWERS, ids=[name for _, _, name in ANSWERS])
def test_the_answer_exists(question, file, name):
    assert has_name((ROOT / file).read_text(encoding="utf-8"), name), f"{question} {file} has no {name}"


@pytest.mark.parametrize("name", ["Wan.no_such", "no_such", "Wan.project.no_such"])
def test_a_name_that_there_is_not_is_found(name):
    assert not has_name((ROOT / "psa_diffusers/families/wan.py").read_text(encoding="utf-8"), name)


def test_the_map_of_the_patch_names_every_file():
    named = set(re.findall(r"\b[a-z_]+\.py\b", section("### The patch")))
    assert named == {path.name for path in (ROOT / "psa_diffusers/patch").rglob("*.py")}


def test_the_map_names_every_folder():
    layout = section("## How the code is laid out")
    named = set(re.findall(r"\b([a-z_]+)/", layout))
    folders = [path for base in (ROOT / "psa_diffusers", ROOT / "kernels/psa_kernels") for path in base.iterdir()]
    there = {path.name for path in folders if (path / "__init__.py").is_file()}
    assert len(there) > 10 and there <= named


def test_paths_in_the_text_exist():
    paths = set(
        re.findall(r"`((?:psa_diffusers|kernels|psa_testing|scripts|tests|docs|examples|configs)/[\w./-]+)`", TEXT)
    )
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert len(paths) > 10 and not missing
