"""The web site: links between files become links between pages, and pages load nothing from other hosts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import psa_diffusers
import psa_kernels
import psa_transformers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hook():
    pytest.importorskip("mkdocs", reason="needs mkdocs: make site")
    import site_pages

    return site_pages


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: make site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize(
    ("path", "link", "becomes"),
    [
        ("README.md", "docs/models.md#families", "models.md#families"),
        ("README.md", "docs/media/side-by-side.webp", "media/side-by-side.webp"),
        ("README.md", "examples/wan.py", "source/examples/wan.py.md"),
        ("docs/models.md", "../CONTRIBUTING.md", "contributing.md"),
        ("CHANGELOG.md", "examples", "source/examples.md"),
        ("docs/models.md", "../README.md", "index.md"),
        ("docs/models.md", "compatibility.md", "compatibility.md"),
        ("docs/benchmarks/index.md", "../kernels.md#the-host", "../kernels.md#the-host"),
        ("docs/api/psa_kernels.md", "../../examples/own_model.py", "../source/examples/own_model.py.md"),
        ("docs/models.md", "../nowhere.md", "../nowhere.md"),
        ("docs/models.md", "https://arxiv.org/abs/2512.04025", "https://arxiv.org/abs/2512.04025"),
        ("docs/models.md", "#families", "#families"),
    ],
)
def test_links_lead_to_pages(hook, path, link, becomes):
    assert hook.rewritten(f"[a]({link}), ![b]({link})", path) == f"[a]({becomes}), ![b]({becomes})"


@pytest.mark.parametrize(
    "package", [psa_diffusers, psa_kernels, psa_transformers], ids=lambda package: package.__name__
)
def test_every_public_name_has_its_place(package):
    page = (ROOT / f"docs/api/{package.__name__}.md").read_text(encoding="utf-8")
    shown = re.findall(rf"^::: {package.__name__}\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(set(package.__all__) - {"__version__"})


def test_lists_in_numbered_items_are_nested(site):
    page = (site / "contributing.html").read_text(encoding="utf-8")
    numbered = page[page.index('id="add-a-model-family"') : page.index('id="add-a-kernel"')]
    assert numbered.count("<ol>") == numbered.count("<ul>") == 1


def test_every_page_is_built(site):
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {"index.html", "contributing.html", "changelog.html", "source/configs/example.yaml.html"} <= built
    docs = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert docs <= built
    assert "apply_psa" in (site / "api/psa_diffusers.html").read_text(encoding="utf-8")


def test_pages_load_nothing_from_other_hosts(site):
    loads = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    imports = re.compile(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^;)]*")
    pages = list(site.rglob("*.html"))
    found = [f"{page.name}: {each}" for page in pages for each in loads.findall(page.read_text(encoding="utf-8"))]
    found += [f"{css.name}: {each}" for css in site.rglob("*.css") for each in imports.findall(css.read_text("utf-8"))]
    assert len(pages) > 20 and found == []


@pytest.mark.parametrize("link", [None, "nowhere.md", "#nowhere", "../nowhere.md"])
def test_a_link_to_nowhere_fails_the_build(link, tmp_path):
    pytest.importorskip("mkdocs", reason="needs mkdocs: make site")
    validation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["validation"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"site_name": "x", "validation": validation}))
    (tmp_path / "docs/index.md").write_text("# Page" if link is None else f"# Page\n\n[a]({link})")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    status = 0 if link is None else 1
    assert done.returncode == status and ("WARNING" in done.stderr) == bool(status), done.stderr
