"""The tables of README and docs, made from the measured JSON files, so that a figure is the same wherever it is shown.

    python scripts/figures.py             # writes every marked block and every page that is a table anew
    python scripts/figures.py --check     # writes nothing; exit status 1 and the names of the files that would change

A block stands between `<!-- figures: NAME -->` and `<!-- /figures -->`; NAME is a function in figure_tables/blocks.py.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from figure_tables.blocks import BLOCKS
from figure_tables.source import load
from operator_bench.tables import report

ROOT = Path(__file__).resolve().parents[1]
MARKED = ("README.md", "docs/*.md", "docs/*/*.md")
# Pages that are one measured file and nothing else.
WHOLE = ("operator", "operator-int8", "operator-budget")
BLOCK = re.compile(r"<!-- figures: (\S+) -->\n(?:.*?\n)??<!-- /figures -->", re.DOTALL)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """The pages that have figures, with the text that they should have.

    Raises:
        KeyError: a marked block has a name that there is no function for.
        LookupError: a JSON file lacks a row that a table needs.
    """
    found = {}
    for path in sorted(path for pattern in MARKED for path in root.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        if BLOCK.search(text):
            found[path] = BLOCK.sub(_filled, text)
    for name in WHOLE:
        found[root / f"docs/benchmarks/{name}.md"] = report(load(f"benchmarks/{name}"))
    return found


def _filled(block: re.Match[str]) -> str:
    name = block[1]
    if name not in BLOCKS:
        raise KeyError(f"no figures are named {name!r}; there are {', '.join(BLOCKS)}")
    return f"<!-- figures: {name} -->\n{BLOCKS[name]()}\n<!-- /figures -->"


def stale(root: Path = ROOT) -> dict[Path, str]:
    """The pages that are not what their JSON files say, with what they should be."""
    return {path: text for path, text in pages(root).items() if path.read_text(encoding="utf-8") != text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    check = parser.parse_args().check
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'is not what its JSON files say' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
