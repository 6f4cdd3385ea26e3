"""The tables of README and docs are what the measured JSON files say, and what is not is found."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from figure_tables import source
from figure_tables.blocks import BLOCKS
from figures import BLOCK, MARKED, pages, stale

ROOT = Path(__file__).resolve().parents[2]


def test_every_table_is_what_its_file_says():
    assert [str(path.relative_to(ROOT)) for path in stale()] == [], "run: python scripts/figures.py"


def test_every_block_is_shown_and_none_is_open():
    text = "\n".join(path.read_text(encoding="utf-8") for pattern in MARKED for path in ROOT.glob(pattern))
    assert {block[1] for block in BLOCK.finditer(text)} == set(BLOCKS)
    assert len(re.findall("<!-- figures:", text)) == len(re.findall("<!-- /figures", text)) == len(BLOCK.findall(text))


def test_a_figure_that_was_changed_by_hand_is_found(tmp_path):
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    for name in ("operator", "operator-int8", "operator-budget"):
        shutil.copy(ROOT / f"docs/benchmarks/{name}.md", tmp_path / f"docs/benchmarks/{name}.md")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme)
    assert not stale(tmp_path)
    (shown,) = set(re.findall(r"\| one forward, Wan2.1-14B 720p \| (\S+ s) \|", readme))
    (tmp_path / "README.md").write_text(readme.replace(shown, "1.23 s"))
    assert stale(tmp_path) == {tmp_path / "README.md": readme}


def test_a_new_measurement_changes_every_place(tmp_path, monkeypatch):
    """The sparse call that README shows in its headline also stands in three other places."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    file = tmp_path / "docs/benchmarks/operator.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for row in document["rows"]:
        if (row["workload"], row["method"], row["stage"]) == ("wan2.1-14b-720p", "psa-hopper", "total"):
            row["ms"] *= 2
    file.write_text(json.dumps(document))
    monkeypatch.setattr(source, "DOCS", tmp_path / "docs")
    source.load.cache_clear()
    try:
        changed = {str(path.relative_to(tmp_path)) for path in stale(tmp_path)}
    finally:
        source.load.cache_clear()
    assert changed == {"README.md", "docs/benchmarks/index.md", "docs/benchmarks/operator.md"}


@pytest.mark.parametrize(("block", "error"), [("none-such", "no figures are named 'none-such'"), ("demo", None)])
def test_a_name_that_there_is_not_is_an_error(block, error, tmp_path):
    (tmp_path / "README.md").write_text(f"<!-- figures: {block} -->\n<!-- /figures -->\n")
    if error is None:
        assert "| dense | 1 | 1 |" in pages(tmp_path)[tmp_path / "README.md"]
    else:
        with pytest.raises(KeyError, match=error):
            pages(tmp_path)


def test_a_missing_row_is_named():
    with pytest.raises(LookupError, match=r"docs/benchmarks/demo.json has no measured row with .*psa-9"):
        source.need("benchmarks/demo", preset="psa-9")


@pytest.mark.parametrize(
    ("ms", "written"),
    [(0.369, "0.369 ms"), (8.665, "8.66 ms"), (46.04, "46.0 ms"), (202.0, "202 ms"), (10840.6, "10.8 s")],
)
def test_durations_have_three_digits(ms, written):
    assert source.duration(ms) == written
