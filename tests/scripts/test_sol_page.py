"""The page on Sol-Attn: its table and sentences from files of calls and of videos, and its plot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from figure_tables import sol, source
from operator_bench.sol_plot import COLOURS, plot
from quality_lab.experiments import EXPERIMENTS

ABOUT = {"hardware": {"gpu": "A GPU"}, "commit": "abc", "date": "2026-01-01"}


def _call(method: str, setting: float, ms: float, error: float, **more: object) -> dict:
    return {
        "method": method,
        "setting": setting,
        "density": setting,
        "kept_lists": False,
        "ms": ms,
        "error": error,
    } | more


def _video(series: str, setting: float, psnr: float, delta: float, **more: object) -> dict:
    against = f"{sol.PSA} {setting}"
    row = {"series": series, "setting": f"{series} {setting}", "against": against, "density": setting}
    return row | {"psnr": psnr, "psnr_ci": 1.26, "flicker": 7.04, "delta_psnr": delta, "delta_ci": 0.5} | more


CALLS = [
    _call("psa-auto", 0.1, 20.0, 0.2),
    _call("psa-auto", 0.1, 16.0, 0.2, kept_lists=True),
    _call("psa-auto", 0.25, 40.0, 0.05),
    _call("sol-int8 top-k", 0.1, 30.0, 0.12, density=0.11),
    _call("sol-int8 top-k", 0.25, 90.0, 0.06),
    {"method": "sol-rule top-k", "setting": 0.1, "density": 0.1, "kept_lists": False, "error": None, "problem": "no"},
]
VIDEOS = [
    _video(sol.PSA, 0.1, 28.0, 0.0),
    _video("psa-auto", 0.1, 31.0, 3.0),
    _video(sol.PSA, 0.25, 33.0, 0.0),
    _video("sol-rule top-k", 0.1, 27.0, -1.0),
    _video("sol-int8 top-k", 0.1, 26.5, -1.5),
    _video("sol-int8 top-k", 0.25, 29.0, -4.0),
]


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for folder in ("benchmarks", "quality"):
        (tmp_path / folder).mkdir()
    (tmp_path / "benchmarks/sol.json").write_text(json.dumps({**ABOUT, "rows": CALLS}))
    monkeypatch.setattr(source, "DOCS", tmp_path)
    source.load.cache_clear()
    yield tmp_path
    source.load.cache_clear()


def _body(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_calls_alone(docs: Path) -> None:
    head, _, *body = _body(sol.compared())
    assert head[-1] == "error of single calls"
    assert body == [
        ["`psa-auto`, not corrected", "0.10", "0.100", "20.0 (16.0)", "0.200"],
        ["`psa-auto`, not corrected", "0.25", "0.250", "40.0", "0.050"],
        ["Sol-Attn, top-k", "0.10", "0.110", "30.0", "0.120"],
        ["Sol-Attn, top-k", "0.25", "0.250", "90.0", "0.060"],
    ]
    assert sol.compared().endswith("[Calls](sol.json): one A GPU, commit abc, 2026-01-01. Videos are not measured yet.")
    # In 30 ms, half way between 20 and 40, psa-auto has the geometric mean of 0.2 and 0.05.
    density, time = sol.ahead().splitlines()
    assert "**0.120** and 0.200 at 0.10, 0.060 and **0.050** at 0.25." in density
    assert "0.120 and **0.100** in 30 ms, 0.060 and **0.050** in 90 ms." in time


def test_videos_beside_calls(docs: Path, tmp_path: Path) -> None:
    (docs / "quality/sol.json").write_text(json.dumps({**ABOUT, "prompts": 48, "rows": VIDEOS}))
    head, _, *body = _body(sol.compared())
    assert head[-2:] == ["PSNR of videos, dB", "flicker"]
    assert ["`psa-auto`", "0.10", "0.100", "20.0 (16.0)", "", "31.0 ± 1.3", "7.0"] in body
    assert ["Sol-Attn's rule, our kernel", "0.10", "0.100", "", "", "27.0 ± 1.3", "7.0"] in body
    assert ["Sol-Attn, top-k", "0.25", "0.250", "90.0", "0.060", "29.0 ± 1.3", "7.0"] in body
    assert len(body) == 6 and "[Videos](../quality/sol.json): 48 prompts, one A GPU" in sol.compared()
    density, time = sol.ahead().splitlines()[2:]
    assert "in dB: -1.5 ± 0.5 at 0.10, -4.0 ± 0.5 at 0.25." in density
    assert "26.5 and 30.5 in 30 ms, 29.0 and 33.0 in 90 ms." in time
    assert plot(sol.points(), tmp_path / "sol.png")
    assert (tmp_path / "sol.png").read_bytes().startswith(b"\x89PNG")


def test_every_series_of_videos_has_a_place() -> None:
    assert {setting.series for setting in EXPERIMENTS["sol"].settings()} == {method.videos for method in sol.METHODS}
    assert len(COLOURS) == len(sol.METHODS) == len(set(COLOURS.values()))
