"""The page on what is not video: its sentences, table and plot follow the two JSON files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import modalities
import pytest
from figure_tables import modalities as figures_of
from figure_tables import source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Lets language.json have other rows; those of the other modalities are as they are."""
    (tmp_path / "quality").mkdir()
    for name in ("real-attention", "language"):
        shutil.copy(ROOT / f"docs/quality/{name}.json", tmp_path / f"quality/{name}.json")
    monkeypatch.setattr(source, "DOCS", tmp_path)

    def change(rows):
        file = tmp_path / "quality/language.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": rows, "note": ""}))
        source.load.cache_clear()

    yield change
    source.load.cache_clear()


def row(task, method, target, figure, kept=True, tokens=512):
    about = {"task": task, "tokens": tokens, "method": method, "kept": kept, "target": target, "texts": 16}
    return about | ({"error": figure} if task == "error" else {"excess": figure, "excess_ci": 0.0123})


DENSE = {"task": "loss", "tokens": 9999, "method": "dense", "kept": None, "target": None, "texts": 16, "excess": 0.0}
TEXT = [
    DENSE,
    *(row("error", "binary", target, 0.5) for target in (0.15, 0.25)),
    row("error", "budget", 0.25, 0.6),
    row("error", "budget", 0.25, 0.1, tokens=256),
    row("error", "budget", 0.25, 0.7, kept=False),
    row("loss", "binary", 0.25, 0.1234),
    row("loss", "budget", 0.25, 0.2345),
]


def test_text_that_was_measured_is_beside_the_others(measured):
    measured(TEXT)
    assert [panel.title.split()[0] for panel in figures_of.panels()] == ["video", "images", "speech", "text"]
    said = figures_of.answer()
    assert "On text it hurts: 1.20 times, and the loss of a window of 512 tokens rises by 0.234 ± 0.012 with `b" in said
    assert ", 0.123 ± 0.012 with `binary`" in said and "`psa-3`" not in said
    table = figures_of.errors()
    assert "| text (SmolLM2-135M, 512 tokens) | **0.500** |  |  |  | **0.500** |  |  | 0.600 |" in table
    assert "tokens), no blocks kept beside the rule's |  |  |  |  |  |  |  | **0.700** |" in table
    assert "| loss over dense, text (SmolLM2-135M, 512 tokens) |  |  |  |  | **0.123** |  |  | 0.234 |" in table
    assert "16 texts" in table and "first look" not in table


def test_words_follow_the_ratio(measured):
    for error, word in ((0.2, "helps: 0.40"), (0.49, "neither helps nor hurts: 0.98"), (0.9, "hurts: 1.80")):
        measured([row("error", "binary", 0.25, 0.5), row("error", "budget", 0.25, error)])
        assert figures_of.answer().endswith(f"On text it {word} times.")


def test_what_was_not_measured_is_said(measured):
    measured([DENSE])
    assert figures_of.answer().endswith("On text errors were not measured yet.")
    assert "text (" not in figures_of.errors()
    assert [panel.title.split()[0] for panel in figures_of.panels()] == ["video", "images", "speech"]


def test_windows_that_were_not_measured_to_the_end_are_left_out(measured):
    measured([*TEXT, row("error", "binary", 0.25, 0.4, tokens=1024), row("error", "budget", 0.25, 0.4, False, 1024)])
    assert "| text (SmolLM2-135M, 512 tokens) |" in figures_of.errors()


def test_needles_have_a_line_a_way(measured):
    found = {"task": "needle", "tokens": 512, "texts": 16, "found_ci": 0.104}
    dense = {"kept": None, "target": None, "dense_last": None}
    way = {"method": "mass", "kept": True, "dense_last": 512}
    rows = [
        found | dense | {"method": "dense", "found": 0.9},
        found | dense | {"method": "unplanted", "found": 0.0},
        found | way | {"target": 0.15, "found": 0.5},
        found | way | {"target": 0.35, "found": 0.75},
        found | way | {"target": 0.15, "dense_last": 0, "found": 0.25},
        found | way | {"target": 0.15, "kept": False, "found": 0.125, "found_ci": None},
        found | way | {"target": 0.15, "tokens": 256, "found": 1.0},
    ]
    measured(rows)
    assert figures_of.needles().splitlines() == [
        "| 512 tokens | first and last kept | dense last | at 0.15 | at 0.35 |",
        "| --- | --- | --- | --- | --- |",
        "| dense |  |  | 0.90 ± 0.10 | 0.90 ± 0.10 |",
        "| unplanted |  |  | 0.00 ± 0.10 | 0.00 ± 0.10 |",
        "| mass | yes | 512 | 0.50 ± 0.10 | 0.75 ± 0.10 |",
        "| mass | yes | 0 | 0.25 ± 0.10 |  |",
        "| mass | no | 512 | 0.12 |  |",
    ]
    measured([DENSE])
    assert figures_of.needles() == "Needles were not measured yet."


def test_the_other_modalities_are_those_of_their_page(measured):
    measured([DENSE])
    page = (ROOT / "docs/quality/real-attention.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("| budget | ")]
    cells = [cell.strip(" *") for cell in line.split("|")[2:-1]]  # three densities of each: images, speech, video
    found = {panel.title.split()[0]: panel.curves["budget"] for panel in figures_of.panels()}
    shown = [f"{found[name][target]:.3f}" for name in ("images", "speech", "video") for target in (0.15, 0.25, 0.35)]
    assert shown == cells


@pytest.mark.parametrize("rows", [TEXT, [DENSE]], ids=["with text", "without"])
def test_the_plot_is_drawn(measured, rows, tmp_path):
    pytest.importorskip("matplotlib")
    measured(rows)
    modalities.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
