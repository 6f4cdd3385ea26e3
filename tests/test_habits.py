"""What stands beside the code agrees with it: the workflow, the hooks, the issue form, the citation, the changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import psa_diffusers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAPER = "2512.04025"


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_workflow_runs_what_every_change_must_pass():
    jobs = read(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["checks"] == [".ci/run"] and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert jobs["checks"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert jobs["versions"]["strategy"]["matrix"]["row"] == ["oldest", "compiler", "newest"]
    (matrix,) = commands["versions"]
    assert "scripts/version_matrix.py" in matrix and "--rows ${{ matrix.row }}" in matrix
    assert commands["package"][-2:] == ["python -m build", "twine check --strict dist/*"]


def test_the_hooks_are_the_lint_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert lint is not None
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [line.strip() for line in lint[1].splitlines()]


def test_the_issue_form_asks_for_the_version():
    form = read(".github/ISSUE_TEMPLATE/bug.yml")
    (versions,) = (part for part in form["body"] if part.get("id") == "versions")
    assert "psa-generate --version" in versions["attributes"]["description"] and versions["validations"]["required"]


def test_the_citation_is_that_of_the_paper():
    citation = read("CITATION.cff")
    paper = citation["preferred-citation"]
    assert paper["url"] == PROJECT["urls"]["Paper"] == f"https://arxiv.org/abs/{PAPER}"
    assert paper["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert PAPER in citation["message"] and "2609.31093" in citation["message"]
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_has_what_is_not_released_first():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d{2}-\d{2}\)", heading) for heading in headings[1:])
    assert re.fullmatch(r"\d+\.\d+\.\d+", psa_diffusers.__version__)
