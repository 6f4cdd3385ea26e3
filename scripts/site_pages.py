"""Hooks of mkdocs: pages of the site that are files outside docs/.

README.md is the first page, and CONTRIBUTING.md and others are pages too, so that nothing is said twice. Where a page
links to another file of the repository (an example, a preset, a source), the site shows that file. Links are written as
they work in the repository and are rewritten here; one that leads nowhere stays as it is, and the strict build then
fails on it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs/"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}
# The target of a Markdown link or image, up to its anchor; titles are not used here.
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Let the API pages know all packages: a name may be one's own and come from another."""
    found = sorted(path.parent.name for base in (ROOT, ROOT / "kernels") for path in base.glob("psa_*/__init__.py"))
    options = config.plugins["mkdocstrings"].config.handlers["python"]["options"]
    options["preload_modules"] = [name for name in found if name not in ("psa_diffusers", "psa_testing")]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files outside docs/, and one for each source that any page links to."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=nested(rewritten(read(path), path))))
    texts = [(path, read(path)) for path in PAGES]
    texts += [
        (DOCS + file.src_uri, file.content_string) for file in files.documentation_pages() if not file.generated_by
    ]
    for source in sorted({source for path, text in texts for source in sources(text, path)}):
        files.append(File.generated(config, f"source/{source}.md", content=shown(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    return markdown if page.file.generated_by else rewritten(markdown, DOCS + page.file.src_uri)


def rewritten(text: str, path: str) -> str:
    """The text of the file at `path` with links between pages of the site instead of files of the repository."""
    here = posixpath.dirname(page_of(path))

    def link(found: re.Match[str]) -> str:
        target = target_of(found[1], path)
        return found[1] if target is None else posixpath.relpath(page_of(target), here or ".")

    return LINK.sub(link, text)


def nested(text: str) -> str:
    """Lists in numbered items as Python-Markdown nests them, by four spaces: elsewhere the width of "1. " will do."""
    return re.sub(r"^   (?=\S)", "    ", text, flags=re.MULTILINE)


def sources(text: str, path: str) -> Iterator[str]:
    """The files and folders, with their files, that a file links to and that are not in docs/ nor pages already."""
    for found in LINK.finditer(text):
        target = target_of(found[1], path)
        if target is not None and page_of(target).startswith("source/"):
            yield from (target, *files_in(target))


def target_of(link: str, path: str) -> str | None:
    """The file or folder of the repository that a link of a file leads to; None if it leads elsewhere or nowhere."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if ":" not in link and not target.startswith("..") and (ROOT / target).exists() else None


def files_in(path: str) -> list[str]:
    """The Python files of a folder; none if it is a file."""
    return sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / path).glob("*.py"))


def page_of(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix(DOCS) if path.startswith(DOCS) else f"source/{path}.md")


def shown(path: str) -> str:
    """A page that shows a file: Markdown as it is, all else as code."""
    if (ROOT / path).is_dir():
        links = (f"- [{file}]({posixpath.relpath(file, posixpath.dirname(path) or '.')}.md)" for file in files_in(path))
        return "\n".join((f"# {path}\n", *links))
    if path.endswith(".md"):
        return rewritten(read(path), path)
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{read(path)}````\n"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
